"""The command `timm-lean depth`: entropy, bound, suggested model, and the baseline beside it."""
import argparse
import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import yaml
from timm.models import get_model_input_config

from timm_lean.checkpoint.files import atomic_file
from timm_lean.checkpoint.format import load_any
from timm_lean.depth.bound import depth_bound, get_rule
from timm_lean.depth.entropy import EntropyResult, dataset_entropy
from timm_lean.depth.family import Budget, bounded_model, default_baseline, describe_member
from timm_lean.depth.images import IMAGE_SUFFIXES
from timm_lean.errors import LeanError
from timm_lean.measure.conv_depth import conv_depth
from timm_lean.measure.report import count_macs, count_params, human_count
from timm_lean.measure.steptime import measure_steps
from timm_lean.training.data import DigitsDataset
from timm_lean.training.device import resolve_device, start_distributed

__all__ = ['ModelRow', 'depth_command', 'open_training_images', 'suggest', 'write_config']

_MAX_DEFAULT_SIZE = 224  # pixels; larger images are usually trained on at this size


@dataclass
class ModelRow:
    """What one of the compared models is and costs.

    Attributes:
        role: 'baseline' or 'suggested'.
        model: timm name or file.
        model_args: Arguments of the name.
        depth: Convolutions on the longest path.
        params: Parameters.
        macs: Multiply-accumulates of one image.
        step_ms: Median milliseconds of a training step, None if not measured.
    """
    role: str
    model: str
    model_args: dict[str, Any]
    depth: int
    params: int
    macs: int
    step_ms: float | None = None


def depth_command(args: argparse.Namespace) -> None:
    """Run `timm-lean depth` with its parsed arguments.

    Raises:
        LeanError: Bad input.
    """
    device = resolve_device(args.device)
    get_rule(args.rule)  # before minutes of reading
    if args.batch_size < 1 or (args.img_size is not None and args.img_size < 1):
        raise LeanError(f'--batch-size and --img-size must be at least 1, got {args.batch_size} and {args.img_size}.')
    if args.write_config:
        _check_trainable(args.data, args.data_dir)
    distributed = int(os.environ.get('WORLD_SIZE', '1')) > 1
    if distributed and args.verify:
        raise LeanError('--verify runs in one process; start it without torchrun.')
    _, rank, _ = start_distributed('cpu')
    try:
        data, num_classes = open_training_images(args.data, args.data_dir)
        entropy = dataset_entropy(
            data, mode=args.mode, bins=args.bins, samples=args.samples, seed=args.seed, workers=args.workers,
            on_error=args.on_error, images_dir=args.images_dir, progress=True)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank > 0:
        return
    size, channels = _network_input(args, entropy)
    num_classes = args.num_classes or num_classes
    baseline = args.baseline or default_baseline(size)
    if num_classes is None:
        num_classes = getattr(load_any(baseline), 'num_classes', 0) or 1
    bound = depth_bound(entropy, size, channels, num_classes, args.rule)
    rows = suggest(args.family, bound, baseline, args.budget, num_classes, size, channels,
                   0 if args.no_step_time else args.batch_size, device)
    if args.write_config:
        write_config(args.write_config, rows[1], args.data, args.data_dir, size)
    report = {
        'entropy': entropy.to_dict(), 'rule': args.rule, 'bound': bound, 'img_size': size, 'channels': channels,
        'num_classes': num_classes, 'batch_size': args.batch_size, 'device': str(device),
        'models': list(map(asdict, rows)),
    }
    if args.verify:
        from timm_lean.training.depth_sweep import verify_bound
        keys = ('data', 'data_dir', 'epochs', 'batch_size', 'train_images', 'lr', 'device', 'workers', 'hflip')
        params = count_params(load_any(baseline, num_classes=num_classes))
        with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
            report['verify'] = verify_bound(
                bound, img_size=size, num_classes=num_classes, family=args.family,
                budget=args.budget or f'params={params}', depths=args.depths, seeds=args.seeds,
                output=args.output or 'output/depth', **{k: getattr(args, k) for k in keys})
    print(json.dumps(report, indent=2) if args.json else _format(report, entropy, rows))


def suggest(
        family: str,
        bound: int,
        baseline: str,
        budget: Budget | str | None,
        num_classes: int,
        img_size: int,
        channels: int,
        batch_size: int,
        device: torch.device,
) -> list[ModelRow]:
    """The baseline and the suggested model, measured; `batch_size` 0 leaves out the step time."""
    extra = {'in_chans': channels} if channels != 3 and not Path(baseline).is_file() else {}
    base = load_any(baseline, num_classes=num_classes, **extra)
    name, arguments = describe_member(family, bound, budget, num_classes, img_size, channels, base)
    suggested = bounded_model(family, bound, budget, num_classes, img_size, channels, base)
    if get_model_input_config(base)['input_size'][0] != channels and not extra:
        raise LeanError(f'The baseline {baseline} takes {get_model_input_config(base)["input_size"][0]} channels, the '
                        f'images have {channels}. Choose another --baseline.')
    shape = (channels, img_size, img_size)
    rows = [
        _row('baseline', baseline, extra, base, shape),
        _row('suggested', name, {k: v for k, v in arguments.items() if k != 'num_classes'}, suggested, shape)]
    if batch_size:
        for row, ms in zip(rows, measure_steps([base, suggested], (batch_size, *shape), device), strict=True):
            row.step_ms = ms
    return rows


def _row(role: str, name: str, args: dict[str, Any], model: nn.Module, shape: tuple[int, int, int]) -> ModelRow:
    return ModelRow(role, name, args, conv_depth(model, shape), count_params(model), count_macs(model, (1, *shape)))


def open_training_images(data: str, data_dir: str | None) -> tuple[Any, int | None]:
    """The images to measure (of a data folder those for training), and the number of their classes if known."""
    if data == 'digits' or (not data and not data_dir):
        return DigitsDataset('train', img_size=8, mode='L'), 10
    if not data_dir:
        raise LeanError('Give --data-dir DIR: a folder of images, one with train/, a tar archive or COCO annotations.')
    path = Path(data_dir)
    if path.suffix.lower() == '.json' and path.is_file():
        try:
            return path, len(json.loads(path.read_text())['categories']) or None
        except (ValueError, KeyError, TypeError, OSError):
            return path, None  # the entropy's own error says more
    if (path / 'train').is_dir():
        path = path / 'train'
    if not path.is_dir():
        return path, None
    classes = [d for d in path.iterdir() if d.is_dir() and any(
        f.suffix.lower() in IMAGE_SUFFIXES for f in d.iterdir())]
    return path, len(classes) or None


def _network_input(args: argparse.Namespace, entropy: EntropyResult) -> tuple[int, int]:
    """Side and channels of what the network will see: as asked for, else the baseline's, else the data's own."""
    channels = 1 if entropy.channels == 1 else 3
    if args.img_size:
        return args.img_size, channels
    if args.baseline:
        return get_model_input_config(load_any(args.baseline))['input_size'][-1], channels
    return min(*entropy.image_size, _MAX_DEFAULT_SIZE), channels


def _check_trainable(data: str, data_dir: str | None) -> None:
    if data == 'digits' or not data_dir:
        return
    if not (Path(data_dir) / 'train').is_dir():
        raise LeanError(f'--write-config is for data that `timm-lean train` reads: {data_dir} has no train/ folder '
                        'with one folder per class. Rearrange it or leave out --write-config.')


def write_config(file: str | Path, row: ModelRow, data: str, data_dir: str | None, img_size: int) -> None:
    """Write a recipe for `timm-lean train --config`: the model, and settings that suit small residual networks."""
    settings: dict[str, Any] = {'model': row.model, 'model_args': row.model_args}
    if data == 'digits' or not data_dir:
        settings['data'] = 'digits'
    else:
        settings.update(data='folder', data_dir=str(Path(data_dir).resolve()))
    settings.update(
        img_size=img_size, epochs=100, batch_size=128, opt='momentum', momentum=0.9, lr=0.1, sched='cosine',
        warmup_epochs=2, weight_decay=5e-4, aug='crop')
    with atomic_file(file) as temporary:
        temporary.write_text('# Written by `timm-lean depth`; run it by `timm-lean train --config THIS_FILE`.\n'
                             + yaml.safe_dump(settings, sort_keys=False))


def _format(report: dict[str, Any], entropy: EntropyResult, rows: list[ModelRow]) -> str:
    low, high = entropy.interval or (entropy.nats, entropy.nats)
    sample = f', {100 * entropy.confidence:g} % interval {low:.4f} to {high:.4f} nats' if high > low else ''
    lines = [
        f'entropy ({entropy.mode}): {entropy.nats:.5f} nats = {entropy.bits:.5f} bits, std {entropy.std:.4f} nats over '
        f'{entropy.count:,} of {entropy.total:,} images{sample}',
        f'images: {entropy.image_size[0]} x {entropy.image_size[1]} (median), '
        + ', '.join(f'{n:,} of {kind}' for kind, n in entropy.formats.items()),
    ]
    if entropy.skipped:
        lines.append(f'skipped {len(entropy.skipped)} unreadable: ' + ', '.join(entropy.skipped[:5])
                     + (' ...' if len(entropy.skipped) > 5 else ''))
    lines += [
        f'bound by the rule {report["rule"]} at {report["img_size"]} px: {report["bound"]} convolution layers',
        '', f'{"":10}{"model":24}{"conv depth":>11}{"params":>13}{"MACs":>11}{"training step":>20}']
    for row in rows:
        step = '-' if row.step_ms is None else f'{row.step_ms:.1f} ms ({row.step_ms / rows[0].step_ms:.2f}x)' \
            if rows[0].step_ms else f'{row.step_ms:.1f} ms'
        lines.append(f'{row.role:10}{row.model:24}{row.depth:>11}{row.params:>13,}{human_count(row.macs):>11}{step:>20}')
    if rows[0].step_ms is not None:
        lines.append(f'training step: batch {report["batch_size"]} on {report["device"]}, {torch.get_num_threads()} '
                     'threads, median, the two in turn')
    shown = ', '.join(f'{k}={tuple(v) if isinstance(v, list) else v}' for k, v in rows[1].model_args.items())
    lines += ['', f"timm.create_model('{rows[1].model}', {shown}, num_classes={report['num_classes']})"]
    if rows[0].depth <= report['bound']:
        lines.append(f'The baseline is within the bound already ({rows[0].depth} of {report["bound"]}).')
    if 'verify' in report:
        lines += ['', report['verify']['text']]
    return '\n'.join(lines)
