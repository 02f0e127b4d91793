"""`timm-lean train`: the classification engine by flags and YAML files."""
import argparse
from typing import Any

from .arguments import MODEL, add_data, add_json, add_training, given
from .opening import finish, is_detector, progress

HELP = 'train a classification model'

_PRUNE = ('amount', 'threshold', 'scope', 'schedule', 'epochs', 'steps', 'every', 'include', 'exclude', 'min_keep',
          'again')


def add_arguments(p: argparse.ArgumentParser) -> None:
    """Flags of `TrainConfig`; those given come before the config file, which comes before the defaults."""
    p.add_argument('--config', help='YAML file, or the name of a shipped one')
    p.add_argument('--model', help=MODEL)
    p.add_argument('--model-args', help='arguments of the timm name, e.g. shared_rank=24 dual=true', nargs='+',
                   metavar='KEY=VALUE')
    p.add_argument('--pretrained', action=argparse.BooleanOptionalAction, help="start from timm's weights")
    p.add_argument('--num-classes', help="number of classes (default: the data's)", type=int)
    add_data(p, 'folder with train/ and val/ or test/, each with one folder per class')
    p.add_argument('--epochs', help='default 100', type=int)
    p.add_argument('--lr', help='learning rate (default 0.1)', type=float)
    p.add_argument('--init', help='data-free initialization before the first epoch: conv_similarity')
    p.add_argument('--init-steps', help='its steps (default 200)', type=int)
    p.add_argument('--distill', help='learn the features of this network: checkpoint, or timm name with weights',
                   metavar='TEACHER')
    add_training(p)
    p.add_argument('--output', help='folder of the run (output/MODEL if not given)', metavar='DIR')
    p.add_argument('--resume', help='continue the run in --output', action='store_const', const=True)
    add_json(p)
    prune = p.add_argument_group('pruning of kernels while training')
    prune.add_argument('--prune', help='by this criterion, e.g. spectral_norm', metavar='CRITERION')
    prune.add_argument('--prune-amount', help='share of the kernels to prune, e.g. 0.7', type=float, metavar='SHARE')
    prune.add_argument('--prune-threshold', help="prune below the criterion's threshold for this t instead",
                       type=float, metavar='T')
    prune.add_argument('--prune-scope', help='share of all kernels: global (default), of each layer or of each filter')
    prune.add_argument('--prune-schedule', help='one_shot (default), linear, cubic or exponential')
    prune.add_argument('--prune-epochs', help='when, in epochs, e.g. 10:30 (one_shot: 10); at the start if not given',
                       metavar='BEGIN:END')
    prune.add_argument('--prune-steps', help='when, in optimizer updates', metavar='BEGIN:END')
    prune.add_argument('--prune-every', help='epochs (or updates) between two updates of the masks (default 1)',
                       type=float, metavar='N')
    prune.add_argument('--prune-include', help='only these layers (repeatable)', action='append', metavar='PATTERN')
    prune.add_argument('--prune-exclude', help='layers to leave alone (repeatable)', action='append',
                       metavar='PATTERN')
    prune.add_argument('--prune-min-keep', help='share of kernels each layer keeps at least (default 0.01)',
                       type=float, metavar='SHARE')
    prune.add_argument('--prune-again', help='prune a model that comes pruned further',
                       action=argparse.BooleanOptionalAction)


def run(args: argparse.Namespace) -> None:
    from timm_lean.errors import LeanError
    from timm_lean.training import TrainConfig, train
    from timm_lean.training.config import load_yaml
    from timm_lean.training.device import is_primary
    config = TrainConfig.from_args(_merged(load_yaml(args.config) if args.config else {}, _flags(args)))
    if is_detector(config.model):
        raise LeanError(f'{config.model} is a detector: train it by tools/train_det.py.')
    with progress(args):
        result = train(config)
    if not is_primary():
        return
    finish(args, result, f'best top-1 {result["best_top1"]:.2f} % in epoch {result["best_epoch"]}; '
           f'{result["output"]}/best.safetensors, last.safetensors, summary.csv, curves.png')


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, by the names of `TrainConfig`."""
    from dataclasses import fields

    from timm_lean.training import TrainConfig
    settings = given(args, *(f.name for f in fields(TrainConfig)))
    if args.model_args:
        settings['model_args'] = dict(map(_key_value, args.model_args))
    settings['prune'] = {**given(args, criterion='prune'), **given(args, **{name: f'prune_{name}' for name in _PRUNE})}
    return settings


def _merged(file: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The file's settings with the flags over them, those of the pruning one by one."""
    prune = file.get('prune')
    if isinstance(prune, dict):
        flags['prune'] = {**prune, **flags['prune']}
    elif prune is not None and not flags['prune']:
        flags['prune'] = prune  # of a wrong type, as TrainConfig says
    return {**file, **flags}


def _key_value(text: str) -> tuple[str, Any]:
    import json

    from timm_lean.errors import LeanError
    key, sep, value = text.partition('=')
    if not sep or not key:
        raise LeanError(f'--model-args takes KEY=VALUE, got {text[:100]!r}.')
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value
