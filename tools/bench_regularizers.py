"""Cost of the regularizers: as a share of a training step, against two other formulations, by width, and in memory.

    python tools/bench_regularizers.py --models resnet18 resnet50 --batch-size 32 --img-size 224

Rounds are interleaved (every measurement once per round), so that a disturbance hits all of them alike; the table shows
the median and the quartiles. The direct computation of all pairs comes after the rounds.
"""
import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F

from timm_lean.layers.filter_banks import find_filter_banks
from timm_lean.measure import peak_memory, training_step
from timm_lean.measure.timing import Timing, time_in_turn
from timm_lean.regularizers import conv_similarity, create_regularizer

REGULARIZERS = [('conv_similarity', {}), ('conv_similarity', {'pairs': 'adjacent'}), ('kernel_ortho', {}), ('srip', {}),
                ('l1', {}), ('group_lasso', {})]


def adjacent_by_grouped_conv(weight: torch.Tensor) -> torch.Tensor:
    """Adjacent pairs as one grouped convolution of each kernel by its neighbour, `[N, C, k, k]`: formulation (a)."""
    kh, kw = weight.shape[2:]
    maps = F.conv2d(weight[:-1].reshape(1, -1, kh, kw), weight[1:].reshape(-1, 1, kh, kw),
                    padding=(kh - 1, kw - 1), groups=weight[1:, :, 0, 0].numel())
    return maps.square().sum()


def all_pairs_by_conv(weight: torch.Tensor) -> torch.Tensor:
    """Gradient of all pairs by the definition, one convolution per channel, `[N, C, k, k]`: formulation (b).

    Differentiated channel by channel, as the maps of all channels at once fit no memory.
    """
    padding = (weight.shape[2] - 1, weight.shape[3] - 1)
    grad = torch.empty_like(weight)
    for c in range(weight.shape[1]):
        kernels = weight[:, c:c + 1].detach().requires_grad_()
        energy = F.conv2d(kernels, kernels, padding=padding).square().sum((2, 3))
        grad[:, c:c + 1], = torch.autograd.grad((energy.sum() - energy.diagonal().sum()) / 2, kernels)
    return grad


def all_pairs(weight: torch.Tensor) -> torch.Tensor:
    """Gradient of all pairs by the identity."""
    return torch.autograd.grad(conv_similarity(weight), weight)[0]


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure; one dict per line of the table.

    Returns:
        Keys `part`, `model`, `what`; `ms`, `q1`, `q3` of `repeats` runs with gradient; in part `'step'` also `share` of
        a training step and `weights_x`, the peak extra memory (gradients and intermediates) as a multiple of the
        convolution weights; in the others `us_per_filter`.
    """
    return [row for part in measure(args) for row in part]


def measure(args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of `run`, part by part as they are measured."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    for name in args.models:
        yield _model_rows(name, args, device)
    yield _width_rows(args, device)


def _model_rows(name: str, args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    model = timm.create_model(name).to(device).train()
    weights = [bank.weight for bank in find_filter_banks(model)]
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    works: dict[str, Callable[[], Any]] = {'training step': training_step(model, images, args.amp)}
    for reg_name, kwargs in REGULARIZERS:
        reg = create_regularizer(reg_name, **kwargs)
        label = ' '.join([reg_name, *kwargs.values()])
        works[label] = lambda reg=reg: reg(model).backward()
    labels = list(works)[1:]
    works['(a) adjacent, grouped conv'] = lambda: sum(map(adjacent_by_grouped_conv, weights)).backward()

    def clear() -> None:
        model.zero_grad(set_to_none=True)

    times = time_in_turn(works, device, args.repeats, warmup=1, before=clear)
    if args.slow_repeats:  # three orders of magnitude slower, so measured after the rounds and less often
        slow = {'(b) all pairs, direct': lambda: [all_pairs_by_conv(w) for w in weights]}
        times.update(time_in_turn(slow, device, args.slow_repeats, warmup=0, before=clear))
    size = sum(w.numel() * w.element_size() for w in weights)
    rows = []
    for label, timing in times.items():
        row = {'part': 'step', 'model': name, 'what': label, **_summary(timing)}
        row['share'] = timing.median / times['training step'].median
        if label in labels:
            clear()
            row['weights_x'] = peak_memory(works[label], device) / size
        rows.append(row)
    return rows


def _width_rows(args: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """3 x 3 filters on a fixed number of channels: linear means equal time per filter."""
    rows = []
    for part, function, widths, repeats in (
            ('all pairs by width', all_pairs, args.widths, args.repeats),
            ('(b) direct by width', all_pairs_by_conv, args.widths[:3], min(args.repeats, 3))):
        weights = {n: torch.randn(n, args.channels, 3, 3, device=device, requires_grad=True) for n in widths}
        works = {str(n): partial(function, w) for n, w in weights.items()}
        for label, timing in time_in_turn(works, device, repeats, warmup=1).items():
            rows.append({'part': part, 'model': f'{args.channels} channels', 'what': f'{label} filters',
                         **_summary(timing), 'us_per_filter': timing.median * 1e6 / int(label)})
    return rows


def _summary(timing: Timing) -> dict[str, float]:
    low, high = timing.quartiles
    return {'ms': 1e3 * timing.median, 'q1': 1e3 * low, 'q3': 1e3 * high, 'repeats': len(timing.seconds)}


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown tables, one per part."""
    lines: list[str] = []
    part = None
    for row in rows:
        stepwise = row['part'] == 'step'
        if (row['part'], row['model']) != part:
            part = (row['part'], row['model'])
            last = ['share of step', 'extra memory / weights'] if stepwise else ['us per filter']
            head = [f'{row["model"]}' if stepwise else f'{row["part"]}, {row["model"]}',
                    'median ms', 'quartiles', 'repeats', *last]
            lines += ['', '| ' + ' | '.join(head) + ' |', '|' + ' --- |' * len(head)]
        cells = [row['what'], f'{row["ms"]:.2f}', f'{row["q1"]:.2f} - {row["q3"]:.2f}', str(row['repeats'])]
        if stepwise:
            memory = row.get('weights_x', math.nan)
            cells += [f'{100 * row["share"]:.2f} %', '' if math.isnan(memory) else f'{memory:.2f}']
        else:
            cells.append(f'{row["us_per_filter"]:.2f}')
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines[1:])


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--models', nargs='*', default=['resnet18', 'resnet50'], help='timm names')
    p.add_argument('--batch-size', type=int, default=32)
    p.add_argument('--img-size', type=int, default=224)
    p.add_argument('--widths', type=int, nargs='+', default=[64, 128, 256, 512, 1024])
    p.add_argument('--channels', type=int, default=128, help='channels in the growth measurement')
    p.add_argument('--repeats', type=int, default=20)
    p.add_argument('--slow-repeats', type=int, default=1,
                   help='repeats of the direct computation of all pairs, which may take minutes; 0: skip')
    p.add_argument('--device', default='cpu')
    p.add_argument('--amp', action='store_true', help='bfloat16 autocast in the training step')
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    print(f'torch {torch.__version__}, {args.device}, {args.threads} threads, batch {args.batch_size} at '
          f'{args.img_size} px{", bfloat16 step" if args.amp else ""}')
    for part in measure(args):
        print('\n' + format_rows(part), flush=True)
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
