"""One table of ratios against anchors measured in the same run: all that this project claims about time.

    python tools/benchmark.py all --write docs/benchmarks.md
    python tools/benchmark.py all --device cuda --batch-size 128 --img-size 224 --amp bf16 --channels-last --compile

A ratio is the median, over interleaved rounds, of one form's time divided by its anchor's in the same round, with the
quartiles behind it; below 1 is faster than the anchor. --write puts the table, with hardware and date, in the place of
the file's earlier one for this kind of device.
"""
import argparse
import datetime
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn as nn
import torch_pruning as tp

sys.path.insert(0, str(Path(__file__).parent))
from bench_criteria import by_linalg
from bench_entropy import decode, generate, measure
from bench_shared import naive_form

import timm_lean
from timm_lean import LeanError
from timm_lean.checkpoint.files import atomic_file
from timm_lean.depth.images import open_source
from timm_lean.layers.classifier import classifier_modules
from timm_lean.measure import count_macs, inference, training_step
from timm_lean.measure.timing import hardware, time_in_turn
from timm_lean.pruning import SpectralImportance, all_scores, prune_channels
from timm_lean.pruning.graph import build_graph, channel_groups
from timm_lean.regularizers import create_regularizer
from timm_lean.training.device import check_compiler, resolve_device

Forms = dict[str, Callable[[], Any]]


class Ratio(NamedTuple):
    """A line of the table."""
    what: str
    anchor: str
    median: float
    low: float
    high: float
    macs: float | None = None  # the form's share of its anchor's MACs, where that is not 1


def ready(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    """A model on the device, in the memory format and compiled as the options say."""
    model.to(args.device, memory_format=torch.channels_last if args.channels_last else None)  # type: ignore[call-overload]
    # one graph or an error: a network that falls back to Python must not be timed as compiled
    return torch.compile(model, backend=args.compile, fullgraph=True, dynamic=False) if args.compile else model


def step_of(model: nn.Module, x: torch.Tensor, args: argparse.Namespace) -> Callable[[], None]:
    return training_step(ready(model, args), x, bool(args.amp))


def pass_of(model: nn.Module, x: torch.Tensor, args: argparse.Namespace) -> Callable[[], None]:
    return inference(ready(model, args), x, bool(args.amp))


def ratios(forms: Forms, pairs: Sequence[tuple[str, str]], repeats: int, device: torch.device) -> list[Ratio]:
    """Time all forms in turn and compare the pairs `(form, anchor)`."""
    timings = time_in_turn(forms, device, repeats, warmup=2)
    rows = []
    for what, anchor in pairs:
        low, median, high = statistics.quantiles(timings[what].ratios(timings[anchor]), n=4, method='inclusive')
        rows.append(Ratio(what, anchor, median, low, high))
    return rows


def with_backward(regularizer: Any, model: nn.Module, args: argparse.Namespace) -> Callable[[], None]:
    def term() -> torch.Tensor:
        return regularizer(model)

    model.to(args.device)
    term()  # finds its layers and looks for NaN, outside a graph
    work = torch.compile(term, backend=args.compile, fullgraph=True) if args.compile else term

    def run() -> None:
        work().backward()
        model.zero_grad()
    return run


def shared_bases(args: argparse.Namespace, x: torch.Tensor) -> list[Ratio]:
    name, dense = 'resnet34_s32u1', 'resnet34'
    models = {'': timm.create_model(name), ', naive form': naive_form(timm.create_model(name))}
    steps: Forms = {f'training step of {name}{k}': step_of(m, x, args) for k, m in models.items()}
    steps[f'training step of {dense}'] = step_of(timm.create_model(dense), x, args)
    first, naive, plain = steps
    reg = 'basis_ortho'
    steps[reg] = with_backward(create_regularizer(reg), models[''], args)
    rows = ratios(steps, [(first, naive), (first, plain), (reg, first)], args.repeats, x.device)
    forms: Forms = {f'inference of {name}': pass_of(models[''], x, args),
                    f'inference of {name}, folded': pass_of(timm_lean.fold(models[''].eval()), x, args),
                    f'inference of {dense}': pass_of(timm.create_model(dense), x, args)}
    first, folded, plain = forms
    return rows + ratios(forms, [(first, plain), (folded, plain)], args.repeats, x.device)


def conversion(args: argparse.Namespace, x: torch.Tensor) -> list[Ratio]:
    rows = []
    for name in ('resnet18', 'resnet50', 'mobilenetv2_100'):
        dense = timm.create_model(name, num_classes=10)
        converted = timm_lean.share(dense, params=0.5)
        macs = count_macs(converted, x.shape) / count_macs(dense, x.shape)
        ours, anchor = (f'training step of {name}, converted to half its parameters, {macs:.2f}x the MACs',
                        f'training step of {name}')
        rows += ratios({ours: step_of(converted, x, args), anchor: step_of(dense, x, args)}, [(ours, anchor)],
                       args.repeats, x.device)
    return rows


def regularizers(args: argparse.Namespace, x: torch.Tensor) -> list[Ratio]:
    model = timm.create_model('resnet50')
    step = 'training step of resnet50'
    forms: Forms = {step: step_of(model, x, args)}
    for name in ('conv_similarity', 'kernel_ortho'):
        forms[name] = with_backward(create_regularizer(name), model, args)
    return ratios(forms, [(name, step) for name in forms if name != step], args.repeats, x.device)


def criteria(args: argparse.Namespace, x: torch.Tensor) -> list[Ratio]:
    weights = [m.weight.detach().to(x.device) for m in timm.create_model('resnet18').modules()
               if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    kernels = torch.cat([w.flatten(0, 1) for w in weights])
    ours, anchor = 'eight criteria of the 3 x 3 kernels of resnet18', 'batched torch.linalg'
    return ratios({ours: lambda: [all_scores(w) for w in weights], anchor: lambda: by_linalg(kernels)},
                  [(ours, anchor)], args.repeats, x.device)


def channel_pruning(args: argparse.Namespace, x: torch.Tensor) -> list[Ratio]:
    dense = timm.create_model('resnet50').to(x.device).eval()
    graph = build_graph(dense, x[:1])
    groups, _ = channel_groups(graph, classifier_modules(dense))
    scores = {'spectral_norm of all channel groups of resnet50': SpectralImportance('spectral_norm'),
              "Torch-Pruning's magnitude importance": tp.importance.GroupMagnitudeImportance()}
    forms: Forms = {name: (lambda imp=imp: [imp(group) for group in groups]) for name, imp in scores.items()}
    ours, anchor = forms
    rows = ratios(forms, [(ours, anchor)], args.repeats, x.device)
    pruned = prune_channels(dense, x[:1], pruning_ratio=args.prune_ratio)
    macs = count_macs(pruned, x.shape) / count_macs(dense, x.shape)
    for batch_size in args.batches or [len(x)]:
        batch = x[:1].repeat(batch_size, 1, 1, 1)
        size = f', batch {batch_size}' if args.batches else ''
        ours = f'inference of resnet50 with {100 * macs:.0f} % of its MACs{size}'
        anchor = f'inference of resnet50{size}'
        forms = {ours: pass_of(pruned, batch, args), anchor: pass_of(dense, batch, args)}
        rows += [row._replace(macs=macs) for row in ratios(forms, [(ours, anchor)], args.repeats, x.device)]
    return rows


def entropy(args: argparse.Namespace, x: torch.Tensor) -> list[Ratio]:
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), 2000, 64)
        source = open_source(folder)
        ours, anchor = 'entropy of 2,000 JPEG images of 64 px', 'decoding them'
        forms: Forms = {ours: lambda: measure(source, 2000, args.workers, 'pooled'),
                        anchor: lambda: decode(source, 2000, args.workers, True)}
        return ratios(forms, [(ours, anchor)], min(args.repeats, 7), torch.device('cpu'))


PARTS = {part.__name__: part for part in (
    shared_bases, conversion, regularizers, criteria, channel_pruning, entropy)}


def run(args: argparse.Namespace) -> Iterator[Ratio]:
    """The lines of the table, as they are measured."""
    torch.manual_seed(0)
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=args.device)
    if args.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    for name in args.only or PARTS:
        torch.compiler.reset()  # what is compiled for one part is in the way of the next
        yield from PARTS[name](args, x)


def setting(args: argparse.Namespace) -> str:
    """Precision, memory format and compilation, in words."""
    backend = '' if args.compile in (None, 'inductor') else f' by {args.compile}'
    return ', '.join(filter(None, [
        args.amp or 'fp32', 'channels last' * args.channels_last, f'compiled{backend}' * bool(args.compile)]))


def format_rows(rows: Sequence[Ratio]) -> str:
    lines = ['| | against | time ratio | quartiles |', '| --- | --- | --- | --- |']
    lines += [f'| {r.what} | {r.anchor} | {r.median:.3f} | {r.low:.3f} - {r.high:.3f} |' for r in rows]
    return '\n'.join(lines)


def split_page(file: Path, kind: str) -> tuple[str, str]:
    """A page before and behind the table of this kind of device, the two marks around it included.

    Raises:
        LeanError: The file does not have the marks.
    """
    start, end = f'<!-- benchmark all, {kind} -->\n', f'<!-- end of benchmark all, {kind} -->'
    page = file.read_text() if file.is_file() else ''
    if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
        raise LeanError(f'{file} needs one line {start.strip()!r} and after it one {end!r}; the table goes between.')
    return page.split(start)[0] + start, end + page.split(end)[1]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--device', default='auto')
    p.add_argument('--batch-size', type=int, default=8)
    p.add_argument('--img-size', type=int, default=128)
    p.add_argument('--repeats', type=int, default=20)
    p.add_argument('--only', nargs='+', choices=PARTS, metavar='PART', help=f'of {", ".join(PARTS)}')
    p.add_argument('--amp', choices=['bf16'], default='', help='forward passes in bfloat16')
    p.add_argument('--channels-last', action='store_true')
    p.add_argument('--compile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile the networks')
    p.add_argument('--batches', type=int, nargs='+', help='batch sizes of the pruned network (default: --batch-size)')
    p.add_argument('--prune-ratio', type=float, default=0.3, help='share of the channels of resnet50 removed')
    p.add_argument('--workers', type=int, default=2, help='processes that read images')
    p.add_argument('--write', metavar='FILE', type=Path, help='also put the table into this Markdown file')
    p.add_argument('--json', metavar='FILE', type=Path, help='also write the rows to this file')
    return p


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    device = args.device = resolve_device(args.device)
    if args.compile:
        check_compiler(device)
    if args.write:
        split_page(args.write, device.type)  # fails before minutes of measuring
    head = (f'{datetime.date.today()}, {hardware(device)}, batch {args.batch_size} at {args.img_size} px, '
            f'{setting(args)}, {args.repeats} interleaved repeats.')
    print(head, flush=True)
    rows = []
    for row in run(args):
        rows.append(row)
        print(f'{row.what} / {row.anchor}: {row.median:.3f}', flush=True)
    text = f'{head}\n\n```\npython tools/benchmark.py all {" ".join(argv)}\n```\n\n{format_rows(rows)}'
    if args.json:
        args.json.write_text(json.dumps([{**row._asdict(), 'setting': setting(args)} for row in rows]))
    if args.write:
        before, after = split_page(args.write, device.type)
        with atomic_file(args.write) as temporary:
            temporary.write_text(f'{before}\n{text}\n\n{after}')
    else:
        print('\n' + text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
