"""Accuracy right after compression, without and with calibration; nothing is trained.

    python tools/reproduce.py calibration --data-dir CIFAR10 --checkpoint resnet20_cifar10.safetensors
    python tools/reproduce.py calibration --data digits --checkpoint output/demo/dense/best.safetensors --round-to 8

Every technique at several strengths, plain and calibrated with `--images` unlabelled training images, evaluated on
`--test-images` test images, the first of `torch.randperm` with seed 0 in the order of the image folder; mean and
standard deviation over `--seeds` choices of the calibration images. CIFAR10 is a folder with `train/<class>/*` and
`test/<class>/*`.
"""
import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.data import create_transform
from tqdm import tqdm

import timm_lean
from timm_lean.pruning import prune_channels, prune_kernels
from timm_lean.training.data import model_data_config, open_dataset
from timm_lean.training.device import resolve_device

BATCH = 250


def techniques(model: nn.Module, x: torch.Tensor, round_to: int) -> dict[str, Callable[[Any], nn.Module]]:
    """Rows of the table: name to a function of the calibration batches (None: without calibration)."""
    rows: dict[str, Callable[[Any], nn.Module]] = {}
    for params in (0.75, 0.7, 0.6, 0.5, 0.35):
        rows[f'share, {params:.0%} of the parameters'] = lambda batches, params=params: timm_lean.share(
            model, params=params, calibration=batches)
    for amount in (0.5, 0.7, 0.8):
        rows[f'kernels {amount:.0%}'] = lambda batches, amount=amount: prune_kernels(
            model, amount=amount, calibration=batches)
    for ratio in (0.25, 0.5):
        rows[f'channels {ratio:.0%}'] = lambda batches, ratio=ratio: prune_channels(
            model, x, pruning_ratio=ratio, round_to=round_to, calibration=batches)
    return rows


def run(args: argparse.Namespace) -> str:
    """Compress, calibrate and evaluate; a Markdown table."""
    device = resolve_device(args.device)
    model = timm_lean.load_model(args.checkpoint).to(device).eval()
    config = model_data_config(model)
    images, labels = load(args, 'eval', args.test_images, 0, config)
    rows = []
    before = accuracy(model, images, labels)
    for name, compress in techniques(model, images[:1].to(device), args.round_to).items():
        if args.only and args.only not in name:
            continue
        row: dict[str, Any] = {'name': name, 'plain': accuracy(compress(None), images, labels), 'calibrated': []}
        start = time.perf_counter()
        for seed in range(args.seeds):
            batches = load(args, 'train', args.images, seed + 1, config)[0].split(BATCH)
            row['calibrated'].append(accuracy(compress(batches), images, labels))
        row['seconds'] = (time.perf_counter() - start) / args.seeds
        rows.append(row)
        tqdm.write(format_rows(before, rows).splitlines()[-1])
    if args.output:
        Path(args.output).write_text(json.dumps({'before': before, 'rows': rows}, indent=1) + '\n')
    return format_rows(before, rows)


def load(
        args: argparse.Namespace, split: str, count: int, seed: int, config: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some images of a split, `[N, C, H, W]`, and their labels."""
    dataset = open_dataset(args.data, args.data_dir, split, config['input_size'][0], config['input_size'][-1])
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    dataset.transform = create_transform(**{k: config[k] for k in keys if k in config})
    chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    pairs = [dataset[i] for i in tqdm(chosen, f'{split} images', leave=False)]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in per cent."""
    device = next(model.parameters()).device
    model.eval()
    right = sum(int((model(x.to(device)).argmax(1).cpu() == y).sum())
                for x, y in zip(images.split(BATCH), labels.split(BATCH), strict=True))
    return 100 * right / len(labels)


def format_rows(before: float, rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, one line per technique and strength."""
    lines = [f'| from {before:.1f} % | without % | calibrated % | spread | seconds |', '|' + ' --- |' * 5]
    for row in rows:
        values = row['calibrated']
        spread = statistics.stdev(values) if len(values) > 1 else 0.
        lines.append(f'| {row["name"]} | {row["plain"]:.1f} | {statistics.mean(values):.1f} | {spread:.2f} | '
                     f'{row["seconds"]:.0f} |')
    return '\n'.join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog='reproduce calibration', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default='folder', choices=['folder', 'digits'])
    p.add_argument('--data-dir', help='folder with train/<class>/* and test/<class>/*')
    p.add_argument('--checkpoint', required=True, help='the trained network')
    p.add_argument('--images', type=int, default=1000, help='calibration images')
    p.add_argument('--test-images', type=int, default=4000)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--round-to', type=int, default=1, help='channels are left in multiples of this')
    p.add_argument('--only', default='', metavar='TEXT', help='rows whose name holds this text')
    p.add_argument('--device', default='cpu')
    p.add_argument('--output', metavar='FILE', help='also write the rows to this file')
    return p
