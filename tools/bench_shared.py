"""Shared bases: training step and inference against the dense network and the naive form.

    python tools/benchmark.py shared --device cuda --model resnet50_shared --batch-size 128
"""
import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent))
from timing import print_timings

import timm_lean
from timm_lean.layers import SharedBasisConv2d
from timm_lean.measure import inference, training_step
from timm_lean.measure.timing import hardware, time_in_turn
from timm_lean.training.device import resolve_device


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

    amp = args.amp == 'bf16'
    steps = {name: training_step(model, x, amp) for name, model in models.items()}
    rows = print_timings('training step', time_in_turn(steps, device, args.repeats), ['naive', 'dense'])
    models['folded'] = timm_lean.fold(models['shared'].eval())
    passes = {name: inference(model, x, amp) for name, model in models.items()}
    return rows + print_timings('inference', time_in_turn(passes, device, args.repeats), ['dense', 'naive'])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='resnet34_s32u1')
    p.add_argument('--dense', help='dense counterpart (default: the name before _s)')
    p.add_argument('--batch-size', type=int, default=8)
    p.add_argument('--img-size', type=int)
    p.add_argument('--channels-last', action='store_true')
    p.add_argument('--amp', choices=['bf16'], default='')
    p.add_argument('--device', default='auto')
    p.add_argument('--repeats', type=int, default=20)
    p.add_argument('--json', metavar='FILE', help='also write the rows to this file')
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    rows = bench_shared(args)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == '__main__':
    sys.exit(main())
