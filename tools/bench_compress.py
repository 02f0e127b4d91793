"""`compress` against Torch-Pruning's magnitude channel pruning and torch's l1 unstructured pruning, at the same sizes.

    python tools/benchmark.py compress --checkpoint resnet20.safetensors --data-dir CIFAR10 --rows rows.jsonl
    python tools/benchmark.py compress --checkpoint mobilenetv2.safetensors --data-dir DIR --agreement --rows rows.jsonl

For each quantity (parameters, MACs, bytes of the file) and each share of it, four ways to get there:
  compress            `timm_lean.compress` with that target, calibrated with unlabelled training images, its search
                      judged by other training images
  compress, floats    of the file only: the same without int8
  torch-pruning       channels by MagnitudeImportance(p=2), BasePruner with one ratio for all layers, as its README
                      shows; the smallest ratio that meets the target. Layers that a shortcut padded with zeros ties to
                      another stage are ignored if the network would not run otherwise
  l1                  torch.nn.utils.prune.global_unstructured with L1Unstructured on all convolutions and linear
                      layers, as torch's tutorial shows. Its zeros are counted as if they cost nothing: parameters are
                      those that are not zero, MACs of a layer are multiplied by its share of them, and the file is four
                      bytes for each of them and one bit for each place (values and a bit mask, no header)
All are measured on the same test images: accuracy, or with --agreement (no labels are needed) how often the first
choice is the original's. --finetune-epochs trains each result further, all in the same way, zeros kept zero. --rows
keeps finished rows: the same command goes on where it was cut off.
"""
import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch_pruning as tp
from safetensors.torch import save
from torch.nn.utils import prune

import timm_lean
from timm_lean import load_model
from timm_lean.checkpoint.files import atomic_file
from timm_lean.export.rounding import round_weights
from timm_lean.measure import count_macs, count_params, human_bytes, human_count
from timm_lean.measure.counts import macs_by_module
from timm_lean.measure.pictures import COLORS, REFERENCE, check_picture, new_figure, save_figure
from timm_lean.measure.timing import hardware
from timm_lean.search.target import TargetError
from timm_lean.training.data import open_eval_loader
from timm_lean.training.evaluate import evaluate

QUANTITIES = ('params', 'macs', 'file')
METHODS = ('compress', 'compress, floats', 'torch-pruning', 'l1')
_STEPS = 9  # halvings of an interval of ratios
_SHOW = {'params': human_count, 'macs': human_count, 'file': human_bytes}
Result = tuple[nn.Module, dict[str, float], str]
"""A network, its sizes, and how it was made."""


class Bench:
    """The network, the images, and how a result is scored."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.model = load_model(args.checkpoint).eval()
        x, y = self._images('train', args.images + args.judge)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(args.seed))
        fitted, judging = order[:args.images], order[args.images:]
        self.batches = list(x[fitted].split(64))
        self.judging = list(zip(x[judging].split(128), y[judging].split(128), strict=True))
        self.train = (x, y)
        x, y = self._images('eval', args.test)
        if args.agreement:
            y = torch.cat([first_choice(self.model, part) for part in x.split(128)])
        self.test = list(zip(x.split(128), y.split(128), strict=True))
        self.x = x[:1]
        self.original = sizes_of(self.model, self.x)
        self.ignored: list[str] | None = None  # layers that Torch-Pruning cannot follow

    def _images(self, split: str, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        loader = open_eval_loader(
            self.model, 'folder', self.args.data_dir, img_size=self.args.img_size, split=split, limit=limit, workers=0)
        xs, ys = zip(*loader, strict=True)
        return torch.cat(xs), torch.cat(ys)

    def score(self, model: nn.Module) -> float:
        return evaluate(model, self.test, torch.device('cpu'))['top1']

    def judge(self, model: nn.Module) -> float:
        return evaluate(model, self.judging, torch.device('cpu'))['top1']

    def make(self, method: str, quantity: str, share: float) -> Result | None:
        """The network of a method that meets a target; None if it cannot."""
        if method.startswith('compress'):
            return self._compress(quantity, share, int8=method == 'compress')
        make = self._torch_pruning if method == 'torch-pruning' else self._l1
        return smallest(make, lambda result: result[1][quantity] <= share * self.original[quantity])

    def _compress(self, quantity: str, share: float, int8: bool) -> Result | None:
        techniques = ['blocks', 'channels', 'share', 'kernels', *['int8'] * int8]
        try:
            new: Any = timm_lean.compress(
                self.model, {quantity: share}, self.batches, evaluate=None if self.args.agreement else self.judge,
                techniques=techniques, minutes=self.args.minutes)
        except TargetError:
            return None
        chosen = new.lean_report.chosen
        return new, {name: chosen.sizes[name] for name in QUANTITIES}, str(chosen)

    def _torch_pruning(self, ratio: float) -> Result | None:
        if self.ignored is None:
            padded = [name for name, m in self.model.named_modules()
                      if isinstance(m, nn.Conv2d) and (name == 'conv1' or name.endswith('.conv2'))]
            self.ignored = next((names for names in ([], padded) if self._pruned(0.5, names) is not None), [])
        model = self._pruned(ratio, self.ignored)
        return None if model is None else (model, sizes_of(model, self.x), f'pruning_ratio={ratio:.3f}')

    def _pruned(self, ratio: float, ignored: Sequence[str]) -> nn.Module | None:
        """A copy without this share of the channels; None if it does not run."""
        model: Any = copy.deepcopy(self.model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                tp.pruner.BasePruner(
                    model, self.x, importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=ratio,
                    ignored_layers=[model.get_classifier(), *map(model.get_submodule, ignored)], in_channel_groups={},
                    out_channel_groups={}, num_heads={}).step()
            with torch.no_grad():
                model(self.x)
        except (RuntimeError, ValueError, IndexError, AssertionError, KeyError) as e:
            print(f'torch-pruning, pruning_ratio={ratio}, {len(ignored)} layers ignored: {type(e).__name__}: '
                  f'{str(e)[:100]}', file=sys.stderr)
            return None
        return model

    def _l1(self, amount: float) -> Result | None:
        model = copy.deepcopy(self.model)
        layers = [(m, 'weight') for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=amount)
        for layer, name in layers:
            prune.remove(layer, name)
        return model, sparse_sizes(model, self.x), f'amount={amount:.3f}'

    def finetune(self, model: nn.Module, epochs: int) -> nn.Module:
        """SGD over the training images in memory, learning rate from 0.01 to 0, flips; zero weights stay zero.

        A network that `compress` stores as int8 is rounded again.
        """
        torch.manual_seed(self.args.seed)
        model = copy.deepcopy(model).train()
        x, y = self.train
        masks = [(p, p != 0) for p in model.parameters() if p.ndim > 1 and (p == 0).any()]
        steps = epochs * (len(x) // 128)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        teacher = self.model if self.args.agreement else None
        for step in range(steps):
            if step % (len(x) // 128) == 0:
                order = torch.randperm(len(x))
            chosen = order[128 * (step % (len(x) // 128)):][:128]
            images = x[chosen].flip(3) if step % 2 else x[chosen]
            target = y[chosen] if teacher is None else first_choice(teacher, images)
            optimizer.zero_grad()
            F.cross_entropy(model(images), target).backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for p, mask in masks:
                    p.mul_(mask)
        rounded = getattr(getattr(model, 'lean_report', None), 'weights', 'float') == 'int8'
        return round_weights(model.eval(), calibration=self.batches) if rounded else model.eval()


@torch.no_grad()
def first_choice(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).argmax(1)


def sizes_of(model: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """Sizes of a dense network: its file is one of plain safetensors."""
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    return {'params': count_params(model), 'macs': count_macs(model, x.shape), 'file': len(save(tensors))}


def sparse_sizes(model: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """Sizes of a network whose zero weights cost nothing, see the top of this file."""
    macs = count_macs(model, x.shape)
    by_module = macs_by_module(model, x.shape)
    params, values, bits = 0, 0, 0
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            live = int((layer.weight != 0).sum()) / layer.weight.numel()
            macs -= round((1 - live) * by_module[name])
            bits += layer.weight.numel()
    for tensor in model.parameters():
        params += int((tensor != 0).sum()) if tensor.ndim > 1 else tensor.numel()
    for _, tensor in model.named_buffers():
        values += tensor.numel() * tensor.element_size()
    return {'params': params, 'macs': macs, 'file': 4 * params + values + -(-bits // 8)}


def smallest(make: Callable[[float], Result | None], met: Callable[[Result], bool]) -> Result | None:
    """The result of the smallest ratio that meets a target, by bisection; sizes fall with the ratio, in steps."""
    best, low, high = None, 0., 0.98
    for _ in range(_STEPS):
        ratio = (low + high) / 2
        result = make(ratio)
        if result is not None and met(result):
            best, high = result, ratio
        else:
            low = ratio
    return best


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what is missing; rows."""
    path = Path(args.rows)
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {(r['network'], r['quantity'], r['share'], r['method'], r['epochs']) for r in rows}
    bench: Bench | None = None
    network = Path(args.checkpoint).stem
    for share in args.shares:
        for quantity in args.quantities:
            for method in args.methods:
                epochs = sorted({0, args.finetune_epochs})
                missing = [e for e in epochs if (network, quantity, share, method, e) not in done]
                if not missing or (method == 'compress, floats' and quantity != 'file'):
                    continue
                bench = bench or Bench(args)
                start = time.perf_counter()
                result = bench.make(method, quantity, share)
                for epoch in missing:
                    row = {'network': network, 'quantity': quantity, 'share': share, 'method': method, 'epochs': epoch,
                           'measure': 'agreement' if args.agreement else 'top-1'}
                    if result is not None:
                        model, sizes, how = result
                        row |= {**sizes, 'how': how, 'score': bench.score(
                            bench.finetune(model, epoch) if epoch else model)}
                    row['seconds'] = round(time.perf_counter() - start, 1)
                    rows.append(row)
                    print(json.dumps(row), flush=True)
                    with atomic_file(path) as temporary:
                        temporary.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    if bench is not None and not any(r['method'] == 'original' and r['network'] == network for r in rows):
        rows.append({'network': network, 'method': 'original', 'quantity': '', 'share': 1., 'epochs': 0,
                     **bench.original, 'score': bench.score(bench.model)})
        with atomic_file(path) as temporary:
            temporary.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return [r for r in rows if r['network'] == network]


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a line per quantity and share, a column per method, the size that was reached in brackets."""
    lines = [f'| target | {" | ".join(METHODS)} |', '|' + ' --- |' * (len(METHODS) + 1)]
    keys = sorted({(r['epochs'], QUANTITIES.index(r['quantity']), -r['share']) for r in rows if r['quantity']})
    for epochs, index, share in keys:
        quantity, cells = QUANTITIES[index], []
        for method in METHODS:
            found = [r for r in rows if (r['method'], r['quantity'], r['share'], r['epochs'])
                     == (method, quantity, -share, epochs)]
            cells.append('' if not found else 'out of reach' if 'score' not in found[0] else
                         f'{found[0]["score"]:.2f} % ({_SHOW[quantity](round(found[0][quantity]))})')
        tuned = f', {epochs} epoch{"s" * (epochs > 1)} of training' if epochs else ''
        lines.append(f'| {quantity}={-share:g}{tuned} | {" | ".join(cells)} |')
    for row in rows:
        if row['method'] == 'original':
            lines.append(f'\nOriginal: {row["score"]:.2f} %, ' + ', '.join(
                f'{name} {_SHOW[name](round(row[name]))}' for name in QUANTITIES) + '.')
    return '\n'.join(lines)


def plot(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Score against each quantity, without training further."""
    original = next(r for r in rows if r['method'] == 'original')
    figure, all_axes = new_figure((13.5, 4.2), columns=len(QUANTITIES))
    for axes, quantity in zip(all_axes, QUANTITIES, strict=True):
        for index, method in enumerate(METHODS):
            points = sorted((r[quantity] / original[quantity], r['score']) for r in rows if r['quantity'] == quantity
                            and r['method'] == method and 'score' in r and not r['epochs'])
            if points:
                axes.plot(*zip(*points, strict=True), marker='oDsv'[index], color=COLORS[index], label=method)
        axes.axhline(original['score'], color=REFERENCE, linestyle=':', label='original')
        axes.set_xlim(0, 1)
        axes.set_xlabel(f'share of the original\'s {quantity}')
        axes.set_ylabel('score (%)')
        axes.legend(fontsize=8)
    save_figure(figure, path)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog='benchmark compress', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--checkpoint', required=True, metavar='FILE', help='the trained network')
    p.add_argument('--data-dir', required=True, metavar='DIR', help='train/ and val/ or test/, with a folder per class')
    p.add_argument('--rows', required=True, metavar='FILE', help='keep finished rows in this file')
    p.add_argument('--img-size', type=int, metavar='N')
    p.add_argument('--images', type=int, default=512, help='to calibrate with')
    p.add_argument('--judge', type=int, default=1500, help='training images that judge the search')
    p.add_argument('--test', type=int, metavar='N', help='test images (default: all)')
    p.add_argument('--agreement', action='store_true', help='score by the original\'s choices instead of labels')
    p.add_argument('--quantities', nargs='+', choices=QUANTITIES, default=list(QUANTITIES))
    p.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS))
    p.add_argument('--shares', nargs='+', type=float, default=[0.7, 0.5, 0.3])
    p.add_argument('--minutes', type=float, default=20., help='of each search')
    p.add_argument('--finetune-epochs', type=int, default=0, metavar='N', help='over the training images that are read')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--plot', metavar='FILE', help='picture of the rows')
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.plot:
        check_picture(args.plot)
    rows = run(args)
    print(f'\n{hardware(torch.device("cpu"))}\n\n{format_rows(rows)}')
    if args.plot:
        plot(rows, args.plot)
    return 0


if __name__ == '__main__':
    sys.exit(main())
