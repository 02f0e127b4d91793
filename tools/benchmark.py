"""Measure what this project claims, as ratios against anchors of the same run.

    python tools/benchmark.py shared                  # shared bases: training step and inference
    python tools/benchmark.py shared --device cuda --model resnet50_shared --batch-size 128

Every figure is the median of interleaved repeats (one of each form in turn, so that a change of the machine's load
falls on all of them alike) with half the interquartile range behind it.
"""
import argparse
import importlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

import timm_lean
from timm_lean.errors import LeanError
from timm_lean.layers import SharedBasisConv2d
from timm_lean.training.device import resolve_device

sys.path.insert(0, str(Path(__file__).parent))


@dataclass
class Timing:
    """Seconds of the repeats of one form."""
    name: str
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2


def interleave(
        forms: dict[str, Callable[[], Any]], repeats: int, device: torch.device, warmup: int = 3) -> list[Timing]:
    """Time functions in turn, `repeats` rounds after a warm-up."""
    timings = {name: Timing(name, []) for name in forms}
    for round_ in range(-warmup, repeats):
        for name, function in forms.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if round_ >= 0:
                timings[name].seconds.append(time.perf_counter() - start)
    return list(timings.values())


def synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def paired_ratio(timing: Timing, anchor: Timing) -> float:
    """Median over the rounds of one form's time divided by the anchor's in the same round."""
    return statistics.median(a / b for a, b in zip(timing.seconds, anchor.seconds, strict=True))


def hardware(device: torch.device) -> str:
    if device.type == 'cuda':
        return f'{torch.cuda.get_device_name(device)}, torch {torch.__version__}'
    try:
        with open('/proc/cpuinfo') as f:
            cpu = next(line.split(':', 1)[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f'{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}'


def print_timings(title: str, timings: Sequence[Timing], anchors: Sequence[str]) -> list[dict[str, Any]]:
    """Print one table, with the ratio to each anchor; returns its rows."""
    by_name = {t.name: t for t in timings}
    rows = []
    print(f'\n{title}')
    print(f'{"":16}{"median":>12}{"spread":>12}' + ''.join(f'{"vs " + a:>16}' for a in anchors))
    for t in timings:
        ratios = {a: paired_ratio(t, by_name[a]) for a in anchors}
        print(f'{t.name:16}{1000 * t.median:>9.2f} ms{1000 * t.spread:>9.2f} ms'
              + ''.join(f'{r:>15.3f}x' for r in ratios.values()))
        rows.append({'table': title, 'form': t.name, 'ms': 1000 * t.median, 'spread_ms': 1000 * t.spread, 'vs': ratios})
    return rows


class NaiveSharedConv2d(nn.Module):
    """The obvious form of a shared-basis convolution: two convolutions and concatenated activations."""

    def __init__(self, layer: SharedBasisConv2d):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [F.conv2d(x, b.weight, None, self.layer.stride, self.layer.padding, groups=b.groups)
                 for b in self.layer.banks()]
        return self.layer.coeff(self.layer.bn(torch.cat(parts, 1)))


def naive_form(model: nn.Module) -> nn.Module:
    """Replace every [unique | shared] convolution by its naive form, in place."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SharedBasisConv2d) and len(child.banks()) == 2:
                setattr(parent, name, NaiveSharedConv2d(child))
    return model


def bench_shared(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Training step and inference of a shared model, its naive form, its folded form and the dense network."""
    device = resolve_device(args.device)
    dense_name = args.dense or args.model.split('_s')[0]
    models = {
        'shared': timm.create_model(args.model),
        'naive': naive_form(timm.create_model(args.model)),
        'dense': timm.create_model(dense_name),
    }
    models = {name: m.to(device, memory_format=torch.channels_last) if args.channels_last else m.to(device)
              for name, m in models.items()}
    size = args.img_size or models['shared'].pretrained_cfg['input_size'][-1]
    x = torch.randn(args.batch_size, 3, size, size, device=device)
    if args.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    print(f'{args.model} against {dense_name}, batch {args.batch_size}, {size} px, {args.amp or "fp32"}, '
          f'{hardware(device)}, {args.repeats} interleaved repeats')

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=args.amp == 'bf16')

    def train_step(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

        def step() -> None:
            with autocast():
                loss = model(x).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return step

    for model in models.values():
        model.train()
    rows = print_timings('training step', interleave(
        {name: train_step(m) for name, m in models.items()}, args.repeats, device), ['naive', 'dense'])

    for model in models.values():
        model.eval()
    forms = {**models, 'folded': timm_lean.fold(models['shared'])}

    def inference(model: nn.Module) -> Callable[[], None]:
        @torch.no_grad()
        def run() -> None:
            with autocast():
                model(x)
        return run

    return rows + print_timings('inference', interleave(
        {name: inference(m) for name, m in forms.items()}, args.repeats, device), ['dense', 'naive'])


# benchmarks in files of their own, each with `main(argv) -> exit code`
_PLUGINS = {
    'regularizers': 'bench_regularizers', 'detection': 'bench_detection', 'criteria': 'bench_criteria',
    'entropy': 'bench_entropy'}


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in _PLUGINS:
        return importlib.import_module(_PLUGINS[sys.argv[1]]).main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='benchmark', required=True)
    for name in _PLUGINS:
        commands.add_parser(name, help=f'see `{name} --help`')
    shared = commands.add_parser('shared', help='shared bases against the dense network and the naive form')
    shared.add_argument('--model', default='resnet34_s32u1')
    shared.add_argument('--dense', help='dense counterpart (default: the name before _s)')
    shared.add_argument('--batch-size', type=int, default=8)
    shared.add_argument('--img-size', type=int)
    shared.add_argument('--channels-last', action='store_true')
    shared.add_argument('--amp', choices=['bf16'], default='')
    shared.add_argument('--device', default='auto')
    shared.add_argument('--repeats', type=int, default=20)
    shared.add_argument('--json', metavar='FILE', help='also write the rows to this file')
    args = parser.parse_args()
    try:
        rows = bench_shared(args)
    except LeanError as e:
        print(f'benchmark {args.benchmark}: {e}', file=sys.stderr)
        return 2
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == '__main__':
    sys.exit(main())
