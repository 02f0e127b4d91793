"""Sharing a trained network, against training the shared one from scratch and against removing channels, on CIFAR-10.

    python tools/reproduce.py sharing --data-dir CIFAR10                                            # on a GPU
    python tools/reproduce.py sharing --data-dir CIFAR10 --train-images 10000 --epochs 8 --finetune-epochs 2 \\
        --params 0.5 0.25                                                                           # on a CPU

A dense network is trained for --epochs, then made smaller in these ways, each followed by --finetune-epochs:
  shared       `share(model, params=...)`
  distilled    the same, fine-tuned with the dense network's features as a second target
  = params     channels removed by magnitude (criterion 'weight') down to the shared network's parameters
  = MACs       channels removed down to its MACs; left out where sharing saves none
  scratch      the shared network's structure, newly initialized (`basis_ortho=10`), trained for all the epochs together
MACs of a shared network are those of the cheaper form of each layer, shared or folded. CIFAR10 is a folder with
`train/<class>/*` and `test/<class>/*`. What is finished is kept in --run, and a repeated command goes on from there.
"""
import argparse
import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from timm_lean import load_model, save_model, share
from timm_lean.checkpoint.format import load_any
from timm_lean.checkpoint.recipe import build, recipe_of
from timm_lean.layers import SharedBasisConv2d
from timm_lean.measure import count_macs, count_params
from timm_lean.pruning import prune_channels
from timm_lean.training import TrainConfig, train
from timm_lean.training.data import create_eval_loader, model_data_config, open_dataset
from timm_lean.training.device import resolve_device
from timm_lean.training.evaluate import evaluate
from timm_lean.training.finetune import finetune


class Experiment:
    """The runs, each done once; results are kept in `rows.json` of the folder.

    Args:
        args: The command's arguments.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.folder = args, Path(args.run)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / 'rows.json'
        self.rows: list[dict[str, Any]] = json.loads(self.file.read_text()) if self.file.is_file() else []
        self.settings = dict(
            data_dir=args.data_dir, train_images=args.train_images, cache=True, workers=0, device=args.device,
            batch_size=args.batch_size, opt='momentum', weight_decay=5e-4, decay_all=True, seed=args.seed)
        self.loader: Any = None

    def run(self) -> list[dict[str, Any]]:
        args = self.args
        dense_file = self.folder / 'dense' / 'last.safetensors'
        if not dense_file.is_file():
            self.train('dense', args.model, args.epochs)
        dense = load_model(dense_file)
        x = torch.zeros(1, *model_data_config(dense)['input_size'])
        size = count_params(dense), count_macs(dense, x.shape)
        self.row('dense', 1., lambda: dense, None)
        for target in args.params:
            shared = share(dense, params=target)
            macs = cheapest_macs(shared, x)
            goals = count_params(shared) / size[0], macs / size[1]
            ways: dict[str, Callable[[], nn.Module]] = {
                'shared': lambda net=shared: net, 'distilled': lambda net=shared: net,  # type: ignore[misc]
                '= params': lambda goal=goals[0]: prune_to(dense, x, goal, count_params),  # type: ignore[misc]
                '= MACs': lambda goal=goals[1]: prune_to(  # type: ignore[misc]
                    dense, x, goal, lambda m: count_macs(m, x.shape)),
                'scratch': lambda net=shared: untrained(net)}  # type: ignore[misc]
            if goals[1] > 0.97:
                ways.pop('= MACs')
            for way, make in ways.items():
                self.row(way, target, make, dense_file)
        return self.rows

    def row(self, way: str, target: float, make: Callable[[], nn.Module], dense_file: Path | None) -> None:
        """Make a network, measure it, train it, measure it again."""
        if any((row['way'], row['target']) == (way, target) for row in self.rows):
            return
        args, start = self.args, time.perf_counter()
        model = make()
        x = torch.zeros(1, *model_data_config(model)['input_size'])
        row = {'way': way, 'target': target, 'params': count_params(model), 'macs': cheapest_macs(model, x),
               'macs_unfolded': count_macs(model, x.shape)}
        file = self.folder / f'{way.strip("= ")}-{target:g}.safetensors'
        if way == 'scratch':
            save_model(model, file)
            row['epochs'] = args.epochs + args.finetune_epochs
            row['after'] = self.train(f'scratch-{target:g}', str(file), row['epochs'], reg=['basis_ortho=10'])
        else:
            row['before'] = self.accuracy(model)
        if way != 'scratch' and dense_file is not None:
            save_model(model, file)
            row['epochs'] = args.finetune_epochs
            row['after'] = finetune(
                file, epochs=args.finetune_epochs, lr=args.finetune_lr, **self.settings,
                **(dict(distill=str(dense_file)) if way == 'distilled' else {}))
        row['seconds'] = time.perf_counter() - start
        self.rows.append(row)
        self.file.write_text(json.dumps(self.rows, indent=1) + '\n')
        print(json.dumps(row), flush=True)

    def train(self, name: str, model: str, epochs: int, **settings: Any) -> float:
        result = train(TrainConfig(
            model=model, epochs=epochs, lr=self.args.lr, sched='cosine', warmup_epochs=1,
            output=str(self.folder / name), resume=True, **self.settings, **settings))
        return result['last']['eval_top1']

    def accuracy(self, model: nn.Module) -> float:
        device = resolve_device(self.args.device)
        if self.loader is None:
            config = model_data_config(model)
            dataset = open_dataset('folder', self.args.data_dir, 'eval', 3, config['input_size'][-1])
            self.loader = create_eval_loader(dataset, config, 250, device, cache=True)
        return evaluate(copy.deepcopy(model).to(device), self.loader, device)['top1']


def untrained(model: nn.Module) -> nn.Module:
    """The same structure, newly initialized, for the same images."""
    new = build(recipe_of(model))
    new.pretrained_cfg = new.default_cfg = model.pretrained_cfg  # type: ignore[assignment]
    return new


def cheapest_macs(model: nn.Module, x: torch.Tensor) -> int:
    """MACs with every shared layer in its cheaper form; batch norms are counted in both."""
    model = copy.deepcopy(model).eval()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SharedBasisConv2d):
            dense = layer.in_channels * layer.kernel_size[0] ** 2  # per filter
            rank = layer.shared_rank + layer.unique_rank
            if rank * (dense + layer.out_channels) > layer.out_channels * dense:
                parent, _, leaf = name.rpartition('.')
                setattr(model.get_submodule(parent), leaf, layer.fuse())
    return count_macs(model, x.shape)


def prune_to(model: nn.Module, x: torch.Tensor, goal: float, count: Callable[[nn.Module], int]) -> nn.Module:
    """Remove channels by magnitude until `count` is nearest to `goal` times the original's."""
    low, high, best, best_gap = 0.02, 0.9, None, float('inf')
    for _ in range(7):
        ratio = (low + high) / 2
        pruned = prune_channels(model, x, criterion='weight', pruning_ratio=ratio, round_to=1)
        gap = count(pruned) / count(model) - goal
        if abs(gap) < best_gap:
            best, best_gap = pruned, abs(gap)
        low, high = (ratio, high) if gap > 0 else (low, ratio)
    assert best is not None
    return best


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, one line per network."""
    lines = ['| network | parameters | MACs | top-1 at once % | epochs after | top-1 after % |', '|' + ' --- |' * 6]
    dense = rows[0]
    for row in rows:
        name = 'dense' if row is dense else f'{row["way"]}, {100 * row["target"]:g} %'
        before, after = (f'{row[k]:.2f}' if k in row else '' for k in ('before', 'after'))
        lines.append(
            f'| {name} | {row["params"]:,} ({100 * row["params"] / dense["params"]:.0f} %) | {row["macs"] / 1e6:.1f} M '
            f'({100 * row["macs"] / dense["macs"]:.0f} %) | {before} | {row.get("epochs", "")} | {after} |')
    return '\n'.join(lines)


def run(args: argparse.Namespace) -> str:
    """Do what is not done yet; a Markdown table."""
    load_any(args.model)  # a wrong name is an error before anything is written
    return format_rows(Experiment(args).run())


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog='reproduce sharing', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data-dir', required=True, help='folder with train/<class>/* and test/<class>/*')
    p.add_argument('--model', default='resnet20_cifar')
    p.add_argument('--params', type=float, nargs='+', default=[0.7, 0.5, 0.25], metavar='SHARE')
    p.add_argument('--epochs', type=int, default=100)
    p.add_argument('--finetune-epochs', type=int, default=10)
    p.add_argument('--batch-size', type=int, default=128)
    p.add_argument('--lr', type=float, default=0.1)
    p.add_argument('--finetune-lr', type=float, default=0.02)
    p.add_argument('--train-images', type=int, help='training images; all if not given')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', default='auto')
    p.add_argument('--run', default='output/sharing', metavar='DIR', help='folder (default output/sharing)')
    return p
