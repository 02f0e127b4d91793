"""Accuracy right after compression, without and with calibration; nothing is trained.

    python tools/reproduce.py calibration --data-dir CIFAR10 --checkpoint resnet20_cifar10.safetensors
    python tools/reproduce.py calibration --data digits --checkpoint output/demo/dense/best.safetensors --round-to 8
    python tools/reproduce.py calibration --data-dir CIFAR10 --checkpoint mobilenetv2.safetensors --agreement \\
        --img-size 128 --test-images 1000 --images 256

Every technique at several strengths, plain and calibrated with `--images` unlabelled training images, evaluated on
`--test-images` test images, the first of `torch.randperm` with seed 0 in the order of the image folder; mean and
standard deviation over `--seeds` choices of the calibration images. CIFAR10 is a folder with `train/<class>/*` and
`test/<class>/*`. Images are resized to what the network takes, or `--img-size`. Where a row says which blocks went,
the plain network lacks those that the first seed chose; where images choose the channels, there is no plain one.

`--agreement` is for images that are not of the network's classes: instead of the accuracy it gives how often the
compressed network's first choice is the original's.

`--output FILE` keeps finished rows: the same command goes on where it was cut off, and prints the table.
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
from timm_lean.measure import count_macs, count_params
from timm_lean.training.data import model_data_config, open_dataset
from timm_lean.training.device import resolve_device

BATCH = 250


def techniques(
        model: nn.Module, x: torch.Tensor, round_to: int, agreement: bool,
) -> dict[str, Callable[[Any], nn.Module | None]]:
    """Rows of the table: name to a function of the calibration batches (None: without calibration)."""
    rows: dict[str, Callable[[Any], nn.Module | None]] = {}
    for params in (0.8,) if agreement else (0.75, 0.7, 0.6, 0.5, 0.35):
        rows[f'share, {params:.0%} of the parameters'] = lambda batches, params=params: timm_lean.share(
            model, params=params, calibration=batches)
    for amount in (0.4,) if agreement else (0.5, 0.7, 0.8):
        rows[f'kernels {amount:.0%}'] = lambda batches, amount=amount: timm_lean.prune_kernels(
            model, amount=amount, calibration=batches)
    for ratio in (0.2,) if agreement else (0.25, 0.5):
        rows[f'channels {ratio:.0%}'] = lambda batches, ratio=ratio: timm_lean.prune_channels(
            model, x, pruning_ratio=ratio, round_to=round_to, calibration=batches)
    for name, options in {'': {}, ', of all together': {'global_pruning': True}}.items() if agreement else ():
        rows[f'channels 20% by images{name}'] = lambda batches, options=options: timm_lean.prune_channels(
            model, x, pruning_ratio=0.2, round_to=round_to, criterion='output', calibration=batches, **options,
        ) if batches else None
    for count in (1,) if agreement else (1, 2, 3):
        rows[f'blocks {count}'] = _without_blocks(model, count)
    return rows


def _without_blocks(model: nn.Module, count: int) -> Callable[[Any], nn.Module]:
    chosen: list[str] = []

    def compress(batches: Any) -> nn.Module:
        if batches is None:
            return timm_lean.remove_blocks(model, blocks=chosen)
        new: Any = timm_lean.remove_blocks(model, count=count, calibration=batches)
        chosen[:] = chosen or [name for name, *_ in new.lean_report.removed]
        return new
    return compress


def run(args: argparse.Namespace) -> str:
    """Compress, calibrate and evaluate; a Markdown table."""
    device = resolve_device(args.device)
    model = timm_lean.load_model(args.checkpoint).to(device).eval()
    config = {**model_data_config(model)}
    if args.img_size:
        config['input_size'] = (config['input_size'][0], args.img_size, args.img_size)
    images, labels = load(args, 'eval', args.test_images, 0, config)
    if args.agreement:
        labels = first_choice(model, images)
    before = accuracy(model, images, labels)

    def macs(network: nn.Module) -> int:
        return count_macs(network, images[:1].shape)

    output = Path(args.output) if args.output else None
    rows = json.loads(output.read_text())['rows'] if output is not None and output.is_file() else []
    for name, compress in techniques(model, images[:1].to(device), args.round_to, args.agreement).items():
        if args.only not in name or name in [row['name'] for row in rows]:
            continue
        row: dict[str, Any] = {'name': name, 'calibrated': [], 'errors': []}
        start = time.perf_counter()
        try:
            for seed in range(args.seeds):
                batches = load(args, 'train', args.images, seed + 1, config)[0].split(BATCH)
                new: Any = compress(batches)
                row['calibrated'].append(accuracy(new, images, labels))
                row['errors'].append((new.calibration_report.before, new.calibration_report.after))
            row['left'] = [count(new) / count(model) for count in (count_params, macs)]
            row['seconds'] = (time.perf_counter() - start) / args.seeds
            plain = compress(None)
            row['plain'] = None if plain is None else accuracy(plain, images, labels)
        except timm_lean.LeanError as e:
            row['refused'] = str(e)
        rows.append(row)
        tqdm.write(format_rows(before, rows, args.agreement).splitlines()[-1])
        if output is not None:
            output.write_text(json.dumps({'before': before, 'rows': rows}, indent=1) + '\n')
    return format_rows(before, rows, args.agreement)


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


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in per cent."""
    return 100 * float((first_choice(model, images) == labels).double().mean())


@torch.no_grad()
def first_choice(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The class that a network takes each image for, `[N]`."""
    device = next(model.parameters()).device
    model.eval()
    return torch.cat([model(x.to(device)).argmax(1).cpu() for x in images.split(BATCH)])


def format_rows(before: float, rows: Sequence[dict[str, Any]], agreement: bool = False) -> str:
    """A Markdown table, one line per technique and strength."""
    of = 'agreement' if agreement else f'from {before:.1f} %'
    lines = [f'| {of} | params, MACs left | without % | calibrated % | spread | output error before, after | seconds |',
             '|' + ' --- |' * 7]
    for row in rows:
        if 'refused' in row:
            lines.append(f'| {row["name"]} | refused: {row["refused"]} |  |  |  |  |  |')
            continue
        values = row['calibrated']
        spread = statistics.stdev(values) if len(values) > 1 else 0.
        errors = ', '.join(f'{statistics.mean(column):.3f}' for column in zip(*row['errors'], strict=True))
        plain = '' if row['plain'] is None else f'{row["plain"]:.1f}'
        left = ', '.join(f'{part:.0%}' for part in row.get('left', ()))
        lines.append(f'| {row["name"]} | {left} | {plain} | {statistics.mean(values):.1f} | {spread:.2f} | {errors} '
                     f'| {row["seconds"]:.0f} |')
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
    p.add_argument('--img-size', type=int, metavar='N', help="image size (default: the network's)")
    p.add_argument('--agreement', action='store_true', help="compare with the original's first choice, not with labels")
    p.add_argument('--output', metavar='FILE', help='keep finished rows in this file')
    return p
