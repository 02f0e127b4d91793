"""`timm-lean depth`: the entropy of images, the depth bound, the network that respects it, the baseline beside it."""
import argparse
from typing import Any

from .arguments import add_data, add_json, given
from .opening import device_of, finish, progress

HELP = 'how deep a network the data asks for, and that network'

_MAX_DEFAULT_SIZE = 224  # pixels; larger images are usually trained on at this size
_TRAINING = ('epochs', 'batch_size', 'train_images', 'lr', 'hflip')


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_data(p, 'image folder (of one with train/ that part), tar archive or COCO json')
    p.add_argument('--images-dir', metavar='DIR', help='images of a COCO json (beside it if not given)')
    add_json(p)
    entropy = p.add_argument_group('entropy')
    entropy.add_argument('--mode', choices=['pooled', 'per_channel', 'grayscale', 'joint', 'dataset'],
                         help='pooled if not given')
    entropy.add_argument('--bins', type=int, help="over the pixel type's range (default 256)")
    entropy.add_argument('--samples', type=int, metavar='N', help='only so many images, with a confidence interval')
    entropy.add_argument('--seed', type=int, help='of the sample (default 0)')
    entropy.add_argument('--on-error', choices=['raise', 'skip'], help='at a broken image (default raise)')
    model = p.add_argument_group('bound and model')
    model.add_argument('--rule', help='from entropy to depth (default bits_per_stage)')
    model.add_argument('--family', help='of the suggested model (default resnet)')
    model.add_argument('--baseline', metavar='MODEL', help='timm name or checkpoint to compare with')
    model.add_argument('--budget', help="of the suggested model: 850k, macs=40M (the baseline's parameters if not "
                       'given)')
    model.add_argument('--num-classes', type=int)
    model.add_argument('--no-step-time', action='store_true', help='do not measure training steps')
    model.add_argument('--write-config', metavar='FILE', help='config of the model for timm-lean train --config')
    sweep = p.add_argument_group('--verify')
    sweep.add_argument('--verify', action='store_true', help='train networks of several depths at equal budget')
    sweep.add_argument('--depths', type=int, nargs='+', metavar='N',
                       help='from a quarter of the bound to three times if not given')
    sweep.add_argument('--seeds', type=int, metavar='N', help='runs of each depth (default 3)')
    sweep.add_argument('--epochs', type=int, help='default 15')
    sweep.add_argument('--lr', type=float, help='default 0.05')
    sweep.add_argument('--hflip', type=float)
    sweep.add_argument('--train-images', type=int, metavar='N')
    sweep.add_argument('--output', metavar='DIR', help='runs and results (output/depth if not given)')


def run(args: argparse.Namespace) -> None:
    import os
    from dataclasses import asdict

    import torch.distributed as dist

    from timm_lean.depth.bound import DEFAULT_RULE, depth_bound, get_rule
    from timm_lean.depth.entropy import dataset_entropy
    from timm_lean.depth.family import default_baseline
    from timm_lean.depth.suggestion import suggest
    from timm_lean.errors import LeanError
    from timm_lean.measure import count_params
    from timm_lean.training.depth_sweep import verify_bound
    from timm_lean.training.device import start_distributed
    device = device_of(args)
    rule = args.rule or DEFAULT_RULE
    get_rule(rule)  # before minutes of reading
    _check(args)
    if int(os.environ.get('WORLD_SIZE', '1')) > 1 and args.verify:
        raise LeanError('--verify runs in one process; start it without torchrun.')
    _, rank, _ = start_distributed('cpu')
    try:
        data, num_classes = open_training_images(args.data, args.data_dir)
        entropy = dataset_entropy(
            data, progress=True,
            **given(args, 'mode', 'bins', 'samples', 'seed', 'workers', 'on_error', 'images_dir'))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank > 0:
        return
    size, channels = _network_input(args, entropy)
    name = args.baseline or default_baseline(size)
    num_classes = args.num_classes or num_classes or getattr(_baseline(args, name), 'num_classes', 0) or 1
    baseline = _baseline(args, name, num_classes=num_classes, in_chans=channels)
    bound = depth_bound(entropy, size, channels, num_classes, rule)
    family = given(args, 'family')
    rows = suggest(
        bound, baseline, baseline_name=name, img_size=size, num_classes=num_classes, in_chans=channels, device=device,
        **family, **given(args, 'budget'), **({'batch_size': 0} if args.no_step_time else given(args, 'batch_size')))
    report: dict[str, Any] = {
        'entropy': entropy.to_dict(), 'rule': rule, 'bound': bound, 'img_size': size, 'channels': channels,
        'num_classes': num_classes, 'device': str(device), 'models': list(map(asdict, rows)),
    }
    if args.write_config:
        _write_config(args, rows[1], size)
    if args.verify:
        with progress(args):
            report['verify'] = verify_bound(
                bound, img_size=size, num_classes=num_classes, budget=args.budget or f'params={count_params(baseline)}',
                **family, **given(args, 'depths', 'seeds', 'output', 'data', 'data_dir', 'workers', 'device',
                                  *_TRAINING))
    finish(args, report, _format(report, entropy, rows))


def _check(args: argparse.Namespace) -> None:
    """Values that are used only after minutes of reading."""
    from timm_lean.depth.family import Budget, check_family
    from timm_lean.errors import LeanError
    from timm_lean.training.config import TrainConfig
    from timm_lean.training.depth_sweep import check_sweep
    from timm_lean.training.settings import check_setting
    for name, value in given(args, 'img_size', 'workers', 'num_classes', 'seed', *_TRAINING).items():
        check_setting(TrainConfig, name, value)
    check_sweep(**given(args, 'seeds', 'depths'))
    if args.images_dir and not str(args.data_dir).lower().endswith('.json'):
        raise LeanError(f'--images-dir {args.images_dir} is for COCO annotations: give --data-dir FILE.json.')
    if args.family:
        check_family(args.family)
    if args.budget:
        Budget.parse(args.budget)
    if args.write_config and args.data != 'digits' and args.data_dir:
        _check_trainable(args.data_dir)


def _baseline(args: argparse.Namespace, name: str, num_classes: int | None = None, in_chans: int = 3) -> Any:
    """The network to compare with. Only its size and speed count, so a bare name may have random weights."""
    import timm

    from timm_lean.checkpoint.format import load_any
    extra: dict[str, Any] = {'in_chans': in_chans} if in_chans != 3 and timm.is_model(name.split('.')[0]) else {}
    return load_any(name, num_classes=num_classes, **extra)


def open_training_images(data: str | None, data_dir: str | None) -> tuple[Any, int | None]:
    """The images to measure (of a data folder those for training), and the number of their classes if known."""
    import json
    from pathlib import Path

    from timm_lean.depth.images import IMAGE_SUFFIXES
    from timm_lean.errors import LeanError
    from timm_lean.training.data import DigitsDataset
    if data == 'digits' or (not data and not data_dir):
        return DigitsDataset('train', img_size=8, mode='L'), 10
    if not data_dir:
        raise LeanError('Give --data-dir DIR: a folder of images, one with train/, a tar archive or COCO annotations.')
    path = Path(data_dir)
    if path.suffix.lower() == '.json' and path.is_file():
        try:
            return path, len(json.loads(path.read_text())['categories']) or None
        except (ValueError, KeyError, TypeError, OSError, RecursionError):
            return path, None  # the entropy's own error says more
    if (path / 'train').is_dir():
        path = path / 'train'
    if not path.is_dir():
        return path, None
    classes = [d for d in path.iterdir() if d.is_dir() and any(
        f.suffix.lower() in IMAGE_SUFFIXES for f in d.iterdir())]
    return path, len(classes) or None


def _network_input(args: argparse.Namespace, entropy: Any) -> tuple[int, int]:
    """Side and channels of what the network will see: as asked for, else the baseline's, else the data's own."""
    from timm.models import get_model_input_config
    channels = 1 if entropy.channels == 1 else 3
    if args.img_size:
        return args.img_size, channels
    if args.baseline:
        return get_model_input_config(_baseline(args, args.baseline))['input_size'][-1], channels
    return min(*entropy.image_size, _MAX_DEFAULT_SIZE), channels


def _check_trainable(data_dir: str) -> None:
    from pathlib import Path

    from timm_lean.errors import LeanError
    if not (Path(data_dir) / 'train').is_dir():
        raise LeanError(f'--write-config is for data that `timm-lean train` reads: {data_dir} has no train/ folder '
                        'with one folder per class. Rearrange it or leave out --write-config.')


def _write_config(args: argparse.Namespace, row: Any, img_size: int) -> None:
    """A config for `timm-lean train --config`: the model, and settings that suit small residual networks."""
    from pathlib import Path

    import yaml

    from timm_lean.checkpoint.files import atomic_file
    settings: dict[str, Any] = {'model': row.model, 'model_args': row.model_args, 'data': 'digits'}
    if args.data != 'digits' and args.data_dir:
        settings.update(data='folder', data_dir=str(Path(args.data_dir).resolve()))
    settings.update(img_size=img_size, opt='momentum', warmup_epochs=2)
    with atomic_file(args.write_config) as temporary:
        temporary.write_text('# Written by `timm-lean depth`; run it by `timm-lean train --config THIS_FILE`.\n'
                             + yaml.safe_dump(settings, sort_keys=False))


def _format(report: dict[str, Any], entropy: Any, rows: list[Any]) -> str:
    import torch

    from timm_lean.measure import human_count
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
        lines.append(f'training step: one batch (--batch-size) on {report["device"]}, {torch.get_num_threads()} '
                     'threads, median, the two in turn')
    shown = ', '.join(f'{k}={tuple(v) if isinstance(v, list) else v}' for k, v in rows[1].model_args.items())
    lines += ['', f"timm.create_model('{rows[1].model}', {shown}, num_classes={report['num_classes']})"]
    if rows[0].depth <= report['bound']:
        lines.append(f'The baseline is within the bound already ({rows[0].depth} of {report["bound"]}).')
    if 'verify' in report:
        lines += ['', report['verify']['text']]
    return '\n'.join(lines)
