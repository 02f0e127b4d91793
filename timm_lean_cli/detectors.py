"""`python -m timm_lean.mmdet`, `tools/train_det.py` and `test_det.py`: the options MMDetection users know.

    python -m timm_lean.mmdet train CONFIG ...     what tools/train_det.py does
    python -m timm_lean.mmdet test FILE ...        what tools/test_det.py does
    python -m timm_lean.mmdet SCRIPT ...           for scripts that import `mmcv.ops` before they read a config

These are no commands of `timm-lean`: they take MMDetection's arguments, `--cfg-options` among them, in its spelling.
"""
import argparse
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ['main', 'test_main', 'train_main']

_DOOR = 'python -m timm_lean.mmdet'
_CONFIG_HELP = "config file, or 'mmdet::...' or 'timm_lean::...' for one that comes with the package"
_NO_DICTS = ('--cfg-options takes KEY=VALUE with numbers, strings, tuples and lists of them. Put a dict into a config '
             'file, or set its keys one by one.')
_SHARED = ('work_dir', 'data_root', 'classes', 'cfg_options', 'launcher')


def main(argv: Sequence[str] | None = None) -> int:
    """Train, test, or run a script as `python SCRIPT ARGS` would; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ('-h', '--help'):
        print(f'usage: {_DOOR} {{train CONFIG | test FILE | SCRIPT}} [ARGS ...]', file=sys.stderr)
        return 0 if argv else 2
    if argv[0] == 'train':
        return train_main(argv[1:], f'{_DOOR} train')
    if argv[0] == 'test':
        return test_main(argv[1:], f'{_DOOR} test')
    if not Path(argv[0]).is_file():
        print(f'{_DOOR}: the script {argv[0]} does not exist.', file=sys.stderr)
        return 2
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    runpy.run_path(argv[0], run_name='__main__')
    return 0


def train_main(argv: Sequence[str] | None = None, prog: str = 'train_det.py') -> int:
    """Train a detector; returns the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description='Train a detector.')
    parser.add_argument('config', help=_CONFIG_HELP)
    _add_common(parser)
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='continue from this checkpoint, or from the latest one in the work dir')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size')
    return _run(parser, argv, _train)


def test_main(argv: Sequence[str] | None = None, prog: str = 'test_det.py') -> int:
    """Evaluate a detector; returns the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description='Evaluate a detector.')
    parser.add_argument('config', nargs='?', help=f'{_CONFIG_HELP}; the one in the checkpoint if left out')
    parser.add_argument('checkpoint', help='.safetensors or .pth file, or the folder of an exported detector')
    _add_common(parser)
    parser.add_argument('--out', metavar='FILE', help='write the predictions to a .pkl file')
    parser.add_argument('--show', action='store_true', help='show pictures of the predictions in a window')
    parser.add_argument('--show-dir', metavar='DIR', help='write pictures of the predictions there')
    parser.add_argument('--wait-time', type=float, metavar='SECONDS', help='how long --show shows each (default 2)')
    parser.add_argument('--trust-imports', action='append', metavar='MODULE',
                        help="import this module of yours if the file's config asks for it (repeatable)")
    parser.add_argument('--tta', action='store_true',
                        help="test-time augmentation, by the config's tta_model and tta_pipeline or by flipping")
    return _run(parser, argv, _test)


def _train(args: argparse.Namespace) -> None:
    from timm_lean.mmdet.launch import train_detector

    from .arguments import given
    train_detector(args.config, **given(args, *_SHARED, 'resume', 'amp', 'auto_scale_lr'))


def _test(args: argparse.Namespace) -> None:
    from timm_lean.mmdet.launch import test_detector

    from .arguments import given
    options = given(args, *_SHARED, 'out', 'show', 'show_dir', 'wait_time', 'tta', 'trust_imports')
    test_detector(args.checkpoint, args.config, **options)


def _add_common(parser: argparse.ArgumentParser) -> None:
    from mmengine.config import DictAction
    parser.add_argument('--work-dir', metavar='DIR', help="folder of the run (default work_dirs/CONFIG's name)")
    parser.add_argument('--data-root', metavar='DIR', help="the dataset's folder, instead of the config's data_root")
    parser.add_argument('--classes', nargs='*', metavar='NAME',
                        help="the data's classes, instead of the config's; without names those in the annotations")
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override settings of the config, e.g. train_dataloader.batch_size=4')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'],
                        help='how several processes were started (default none)')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')


def _run(
        parser: argparse.ArgumentParser, argv: Sequence[str] | None, work: Callable[[argparse.Namespace], None],
) -> int:
    import torch

    from timm_lean.errors import LeanError
    try:
        args = parser.parse_intermixed_args(argv)
    except RecursionError:  # MMEngine's parser, at a dict with a comma
        parser.error(_NO_DICTS)
    if 'dict(' in str(args.cfg_options or ''):  # one without is a string to it
        parser.error(_NO_DICTS)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))  # where MMEngine reads it
    try:
        work(args)
    except LeanError as e:
        if args.debug:
            traceback.print_exc()
        print(f'{parser.prog}: {_message(e)}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def _message(error: Exception) -> str:
    """An error in one line. Raised in a data loading process it carries that process's traceback in its text."""
    return ' '.join(re.split(r'\w*(?:Lean|Checkpoint)Error: ', str(error))[-1].split())


if __name__ == '__main__':
    sys.exit(main())
