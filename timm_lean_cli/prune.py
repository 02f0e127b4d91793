"""`timm-lean prune`: prune a checkpoint's kernels or channels, and say what it cost and saved."""
import argparse
import csv
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.models import get_model_input_config

from timm_lean.checkpoint.files import atomic_file, output_file, writable_dir
from timm_lean.checkpoint.format import load_any, save_model
from timm_lean.checkpoint.recipe import has_step
from timm_lean.errors import LeanError
from timm_lean.measure.pictures import save_figure
from timm_lean.measure.report import count_macs, count_params, human_bytes, human_count
from timm_lean.pruning.analysis import analyze_criteria
from timm_lean.pruning.channels import prune_channels
from timm_lean.pruning.compaction import compact
from timm_lean.pruning.kernels import prune_kernels
from timm_lean.pruning.report import live_kernels
from timm_lean.pruning.spectral import check_criterion

__all__ = ['analyze_command', 'channel_options', 'prune_command']


def prune_command(args: argparse.Namespace) -> None:
    """Run `timm-lean prune`.

    Args:
        args: `model`, `output`, `criterion`, `granularity`, `threshold`, `amount`, `contrib`, `scope`, `ratio`,
            `global_pruning`, `round_to`, `min_keep`, `ignore`, `again`, `compact`, `plot`, `data`, `data_dir`,
            `img_size`, `device`, `batch_size`, `workers`, `finetune_epochs`, `finetune_lr`; those not given may be
            missing.

    Raises:
        LeanError: Options that contradict each other, or a model that cannot be pruned so.
    """
    option = vars(args).get
    output = output_file(args.output, '.safetensors')
    criterion = check_criterion(option('criterion') or 'spectral_norm')
    granularity = option('granularity') or 'kernel'
    _check_options(args, granularity)
    model = load_any(args.model).eval()
    x = torch.zeros(1, *get_model_input_config(model)['input_size'])
    before = _figures(model, x, args, Path(args.model))
    if granularity == 'kernel':
        min_keep = option('min_keep')
        model = prune_kernels(
            model, criterion=criterion, threshold=option('threshold'), amount=option('amount'),
            contrib=option('contrib'), scope=option('scope') or 'global', exclude=option('ignore'),
            again=bool(option('again')), **({} if min_keep is None else {'min_keep': min_keep}))
        print(model.lean_report)
        if option('plot'):
            save_figure(model.lean_report.figure(), args.plot)  # type: ignore[union-attr, operator]
        if option('compact'):
            model = compact(model, x)
            print(model.lean_report)
    else:
        if has_step(model, 'resize') and not option('again'):
            raise LeanError(
                f'{args.model} has been pruned by channels before. If pruning it again is meant, say --again.')
        model = prune_channels(model, x, criterion=criterion, **channel_options(args))
        print(model.lean_report)
    save_model(model, output)
    columns = {'before': before, 'pruned': _figures(model, x, args, output)}
    if option('finetune_epochs'):
        from timm_lean.training.finetune import finetune
        keys = ('data', 'data_dir', 'img_size', 'device', 'batch_size', 'workers')
        finetune(output, args.finetune_epochs, option('finetune_lr') or 0.01,
                 {k: option(k) for k in keys if option(k) is not None})
        columns['fine-tuned'] = _figures(load_any(str(output)).eval(), x, args, output)
    _print_figures(columns)


def _check_options(args: argparse.Namespace, granularity: str) -> None:
    if vars(args).get('finetune_epochs') and not _has_data(args):
        raise LeanError('--finetune-epochs needs data: --data-dir DIR, or --data digits.')
    belongs = {
        'kernel': ('threshold', 'amount', 'contrib', 'scope', 'min_keep', 'compact', 'plot'),
        'channel': ('ratio', 'global_pruning', 'round_to'),
    }
    for other, names in belongs.items():
        if other != granularity:
            wrong = [f'--{n.replace("_", "-")}' for n in names if vars(args).get(n) not in (None, False)]
            if wrong:
                raise LeanError(f'{", ".join(wrong)} belongs to --granularity {other}, not {granularity}.')


def prune_detector_command(args: argparse.Namespace) -> None:
    """Run `timm-lean prune` on a detector.

    Raises:
        LeanError: Options for classification, or a detector that cannot be pruned so.
    """
    from timm_lean.mmdet.prune import prune_detector
    if args.granularity != 'channel':
        raise LeanError(f'{args.model} is a detector: give --granularity channel. Its kernels are pruned while it '
                        'trains, by KernelPruningHook.')
    if args.data or args.data_dir or args.finetune_epochs:
        raise LeanError(f'{args.model} is a detector: --data, --data-dir and --finetune-epochs are for classification. '
                        'Fine-tune it with tools/train_det.py and model.backbone.checkpoint=FILE load_from=FILE.')
    output = output_file(args.output, '.safetensors')
    model: Any = prune_detector(
        args.model, output, criterion=check_criterion(args.criterion), again=args.again, **channel_options(args))
    print(model.lean_report)


def channel_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that channel pruning takes, by the names of `prune_channels`."""
    option = vars(args).get
    return dict(
        pruning_ratio=0.5 if option('ratio') is None else args.ratio, global_pruning=bool(option('global_pruning')),
        round_to=option('round_to') or 8, exclude=option('ignore'))


def _figures(model: nn.Module, x: torch.Tensor, args: argparse.Namespace, path: Path) -> dict[str, Any]:
    kernels = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    figures: dict[str, Any] = {
        'parameters': f'{count_params(model):,}',
        'non-zero': f'{sum(int((p != 0).sum()) for p in model.parameters()):,}',
        'live kernels': f'{sum(int(live_kernels(w).sum()) for w in kernels):,}',
        'MACs': human_count(count_macs(model, x.shape)),
        'file': human_bytes(path.stat().st_size) if path.is_file() else '-',
    }
    if _has_data(args):
        figures['top-1'] = f'{_accuracy(model, args):.2f} %'
    return figures


def _has_data(args: argparse.Namespace) -> bool:
    return bool(vars(args).get('data_dir') or vars(args).get('data'))


def _accuracy(model: nn.Module, args: argparse.Namespace) -> float:
    from timm_lean.training.device import resolve_device
    from timm_lean.training.evaluate import evaluate_source
    option = vars(args).get
    metrics = evaluate_source(
        args.model, model, option('data') or '', option('data_dir'), option('img_size'), option('batch_size') or 128,
        resolve_device(option('device') or 'auto'), option('workers') or 0)
    model.cpu()
    return metrics['top1']


def _print_figures(columns: dict[str, dict[str, Any]]) -> None:
    print(f'{"":14}' + ''.join(f'{title:>16}' for title in columns))
    for name in columns['before']:
        print(f'{name:14}' + ''.join(f'{column[name]:>16}' for column in columns.values()))


def analyze_command(args: argparse.Namespace) -> None:
    """Run `timm-lean analyze MODEL --criteria`; `args` has `model`, `threshold`, `ignore`, `output`."""
    threshold = vars(args).get('threshold')
    analysis = analyze_criteria(
        load_any(args.model), threshold=1e-4 if threshold is None else threshold, exclude=vars(args).get('ignore'))
    print(analysis)
    folder = writable_dir(vars(args).get('output') or 'output/analysis')
    for name, rows in analysis.tables().items():
        with atomic_file(folder / f'{name}.csv') as temporary, open(temporary, 'w', newline='') as f:
            csv.writer(f).writerows(rows)
        print(folder / f'{name}.csv')
    save_figure(analysis.figure(), folder / 'criteria.png')
    print(folder / 'criteria.png')
