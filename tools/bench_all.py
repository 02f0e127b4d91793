"""One table of ratios against anchors measured in the same run: all that this project claims about time.

    python tools/benchmark.py all --write docs/benchmarks.md
    python tools/benchmark.py all --device cuda --batch-size 128 --img-size 224 --write docs/benchmarks.md

A ratio is the median, over interleaved rounds, of one form's time divided by its anchor's in the same round, with the
quartiles behind it; below 1 is faster than the anchor. --write puts the table, with hardware and date, in the place of
the file's earlier one for this kind of device.
"""
import argparse
import datetime
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
from timm_lean.training.device import resolve_device

Forms = dict[str, Callable[[], Any]]


class Ratio(NamedTuple):
    """A line of the table."""
    what: str
    anchor: str
    median: float
    low: float
    high: float


def ratios(forms: Forms, pairs: Sequence[tuple[str, str]], repeats: int, device: torch.device) -> list[Ratio]:
    """Time all forms in turn and compare the pairs `(form, anchor)`."""
    timings = time_in_turn(forms, device, repeats, warmup=2)
    rows = []
    for what, anchor in pairs:
        low, median, high = statistics.quantiles(timings[what].ratios(timings[anchor]), n=4, method='inclusive')
        rows.append(Ratio(what, anchor, median, low, high))
    return rows


def with_backward(regularizer: Any, model: nn.Module) -> Callable[[], None]:
    def run() -> None:
        regularizer(model).backward()
        model.zero_grad()
    return run


def shared_bases(args: argparse.Namespace, x: torch.Tensor) -> list[Ratio]:
    name, dense = 'resnet34_s32u1', 'resnet34'
    models = {'': timm.create_model(name), ', naive form': naive_form(timm.create_model(name))}
    steps: Forms = {f'training step of {name}{k}': training_step(m, x) for k, m in models.items()}
    steps[f'training step of {dense}'] = training_step(timm.create_model(dense), x)
    first, naive, plain = steps
    reg = 'basis_ortho'
    steps[reg] = with_backward(create_regularizer(reg), models[''])
    rows = ratios(steps, [(first, naive), (first, plain), (reg, first)], args.repeats, x.device)
    forms: Forms = {f'inference of {name}': inference(models[''], x),
                    f'inference of {name}, folded': inference(timm_lean.fold(models[''].eval()), x),
                    f'inference of {dense}': inference(timm.create_model(dense), x)}
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
        rows += ratios({ours: training_step(converted, x), anchor: training_step(dense, x)}, [(ours, anchor)],
                       args.repeats, x.device)
    return rows


def regularizers(args: argparse.Namespace, x: torch.Tensor) -> list[Ratio]:
    model = timm.create_model('resnet50').to(x.device)
    step = 'training step of resnet50'
    forms: Forms = {step: training_step(model, x)}
    for name in ('conv_similarity', 'kernel_ortho'):
        forms[name] = with_backward(create_regularizer(name), model)
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
    name = f'inference of resnet50 with {100 * macs:.0f} % of its MACs'
    forms = {name: inference(pruned, x), 'inference of resnet50': inference(dense, x)}
    return rows + ratios(forms, [(name, 'inference of resnet50')], args.repeats, x.device)


def entropy(args: argparse.Namespace, x: torch.Tensor) -> list[Ratio]:
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder), 2000, 64)
        source = open_source(folder)
        ours, anchor = 'entropy of 2,000 JPEG images of 64 px', 'decoding them'
        forms: Forms = {ours: lambda: measure(source, 2000, args.workers, 'pooled'),
                        anchor: lambda: decode(source, 2000, args.workers, True)}
        return ratios(forms, [(ours, anchor)], min(args.repeats, 7), torch.device('cpu'))


PARTS = (shared_bases, conversion, regularizers, criteria, channel_pruning, entropy)


def run(args: argparse.Namespace) -> Iterator[Ratio]:
    """The lines of the table, as they are measured."""
    device = resolve_device(args.device)
    torch.manual_seed(0)
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size, device=device)
    for part in PARTS:
        if args.only in (None, part.__name__):
            yield from part(args, x)


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
    p.add_argument('--prune-ratio', type=float, default=0.3, help='share of the channels of resnet50 removed')
    p.add_argument('--workers', type=int, default=2, help='processes that read images')
    p.add_argument('--only', choices=[part.__name__ for part in PARTS], help='one part of the table')
    p.add_argument('--write', metavar='FILE', type=Path, help='also put the table into this Markdown file')
    return p


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    device = resolve_device(args.device)
    if args.write:
        split_page(args.write, device.type)  # fails before minutes of measuring
    head = (f'{datetime.date.today()}, {hardware(device)}, batch {args.batch_size} at {args.img_size} px, '
            f'{args.repeats} interleaved repeats.')
    print(head, flush=True)
    rows = []
    for row in run(args):
        rows.append(row)
        print(f'{row.what} / {row.anchor}: {row.median:.3f}', flush=True)
    text = f'{head}\n\n```\npython tools/benchmark.py all {" ".join(argv)}\n```\n\n{format_rows(rows)}'
    if args.write:
        before, after = split_page(args.write, device.type)
        with atomic_file(args.write) as temporary:
            temporary.write_text(f'{before}\n{text}\n\n{after}')
    else:
        print('\n' + text)
    return 0


if __name__ == '__main__':
    sys.exit(main())
