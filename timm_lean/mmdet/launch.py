"""What `tools/train_det.py` and `test_det.py` do: MMEngine's Runner behind the options MMDetection users know.

Before a Runner is built the config and its data are looked at, so that a mistake is one line and not a traceback from
a dataset. On a machine without a GPU, AMP is left out (MMEngine has none there) and processes talk through gloo.
"""
import argparse
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmdet.evaluation import DumpDetResults
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.runner import Runner

from timm_lean.checkpoint.files import output_file
from timm_lean.errors import LeanError

from .checks import check_settings, registry_errors
from .data import check_data, datasets
from .detector import WEIGHTS_FILE, load_detector, load_strictly
from .hooks import unwrap
from .own_data import settle_data
from .settings import open_config

__all__ = ['main_message', 'prepare', 'test_main', 'train_main']

_CONFIG_HELP = "config file, or 'mmdet::...' or 'timm_lean::...' for one that comes with the package"
_NO_DICTS = ('--cfg-options takes KEY=VALUE with numbers, strings, tuples and lists of them. Put a dict into a config '
             'file, or set its keys one by one.')


def train_main(argv: Sequence[str] | None = None, prog: str = 'train_det.py') -> int:
    """`tools/train_det.py`; returns the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description='Train a detector.')
    parser.add_argument('config', help=_CONFIG_HELP)
    _add_common(parser)
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='continue from this checkpoint, or from the latest one in the work dir')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size')
    return _run(parser, argv, _train)


def test_main(argv: Sequence[str] | None = None, prog: str = 'test_det.py') -> int:
    """`tools/test_det.py`; returns the exit code."""
    parser = argparse.ArgumentParser(prog=prog, description='Evaluate a detector.')
    parser.add_argument('config', nargs='?', help=f'{_CONFIG_HELP}; the one in the checkpoint if left out')
    parser.add_argument('checkpoint', help='.safetensors or .pth file, or the folder of an exported detector')
    _add_common(parser)
    parser.add_argument('--out', metavar='FILE', help='write the predictions to a .pkl file')
    parser.add_argument('--show', action='store_true', help='show pictures of the predictions in a window')
    parser.add_argument('--show-dir', metavar='DIR', help='write pictures of the predictions there')
    parser.add_argument('--wait-time', type=float, default=2., metavar='SECONDS', help='how long --show shows each')
    parser.add_argument('--tta', action='store_true',
                        help="test-time augmentation, by the config's tta_model and tta_pipeline or by flipping")
    return _run(parser, argv, _test)


def _train(args: argparse.Namespace) -> None:
    cfg = _settle(open_config(args.config), args, args.config)
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise LeanError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config.')
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    prepare(cfg, ('train', 'val'))
    with registry_errors():
        runner = Runner.from_cfg(cfg)
    if cfg.get('load_from'):
        # MMEngine loads it again, and only warns about what does not fit; heads may be others, the backbone not
        load_strictly(unwrap(runner.model), cfg.load_from, part='' if cfg.resume else 'backbone.')
    with registry_errors():
        runner.train()


def _test(args: argparse.Namespace) -> None:
    out = output_file(args.out, '.pkl', '--out') if args.out else None
    if not args.wait_time >= 0:
        raise LeanError(f'--wait-time takes seconds of at least 0, got {args.wait_time}.')
    checkpoint = Path(args.checkpoint)
    if args.config is None:
        cfg = _settle(_stored_config(checkpoint), args, args.checkpoint)
    else:
        cfg = _settle(open_config(args.config), args, args.config)
    cfg.load_from, cfg.resume = None, False
    prepare(cfg, ('test',))
    if args.show or args.show_dir:
        cfg.setdefault('default_hooks', {})
        cfg.default_hooks['visualization'] = dict(
            type='DetVisualizationHook', draw=True, show=args.show, wait_time=args.wait_time,
            test_out_dir=str(Path(args.show_dir).absolute()) if args.show_dir else None)
        if not cfg.get('visualizer'):  # a file says none, for it says where to write
            cfg.visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
    if args.tta:
        _augment(cfg)
    with registry_errors():
        runner = Runner.from_cfg(cfg)
    detector = unwrap(runner.model)
    load_strictly(
        detector.module if args.tta else detector,  # type: ignore[arg-type]
        checkpoint / WEIGHTS_FILE if checkpoint.is_dir() else checkpoint)
    if out is not None:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=str(out)))
    with registry_errors():
        runner.test()


def _stored_config(source: Path) -> Config:
    """The config in a detector's file or folder, for an evaluation; where to write is not the file's to say.

    Raises:
        LeanError: It does not say which detector it holds, or cannot be loaded.
    """
    if source.suffix != '.safetensors' and not source.is_dir():
        raise LeanError(f'{source} does not say which detector it holds. Give its config: CONFIG {source}.')
    detector: Any = load_detector(source)  # says what is wrong with it
    cfg: Config = detector.cfg
    for key in ('work_dir', 'default_hooks', 'custom_hooks', 'vis_backends'):
        cfg.pop(key, None)
    cfg.visualizer = dict(type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
    evaluators = cfg.get('test_evaluator')
    for evaluator in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
        if isinstance(evaluator, dict):
            evaluator.pop('outfile_prefix', None)
    return cfg


def _augment(cfg: Config) -> None:
    """Test-time augmentation as in MMDetection's `tools/test.py`: the config's own, else by flipping, in place."""
    cfg.setdefault('tta_model', dict(
        type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)))
    for dataset in datasets(cfg.test_dataloader.dataset):
        if 'tta_pipeline' not in cfg:
            meta_keys = (
                'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
            flips = [dict(type='RandomFlip', prob=1.), dict(type='RandomFlip', prob=0.)]
            cfg.tta_pipeline = [*dataset.pipeline[:-1], dict(
                type='TestTimeAug', transforms=[flips, [dict(type='PackDetInputs', meta_keys=meta_keys)]])]
        dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def prepare(cfg: Config, splits: Sequence[str]) -> None:
    """Check a config's settings and data and fit it to this machine, in place.

    Raises:
        LeanError: A setting is out of range, or annotations are missing, damaged or do not fit the config.
    """
    check_settings(cfg, splits)
    check_data(cfg, splits)
    if torch.cuda.is_available():
        return
    if cfg.get('optim_wrapper', {}).get('type') == 'AmpOptimWrapper':
        print('No GPU: training in full precision (MMEngine has no AMP on CPUs).', flush=True)
        cfg.optim_wrapper = ConfigDict({
            **{k: v for k, v in cfg.optim_wrapper.items() if k not in ('loss_scale', 'dtype', 'use_fsdp')},
            'type': 'OptimWrapper'})
    if cfg.get('launcher', 'none') == 'pytorch':
        # MMEngine would choose a CUDA device for the process
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group('gloo')
        cfg.setdefault('model_wrapper_cfg', dict(
            type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False)))


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--work-dir', metavar='DIR', help="folder of the run (default work_dirs/CONFIG's name)")
    parser.add_argument('--data-root', metavar='DIR', help="the dataset's folder, instead of the config's data_root")
    parser.add_argument('--classes', nargs='*', metavar='NAME',
                        help="the data's classes, instead of the config's; without names those in the annotations")
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='override settings of the config, e.g. train_dataloader.batch_size=4')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none',
                        help='how several processes were started')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')


def _settle(cfg: Config, args: argparse.Namespace, name: str) -> Config:
    """A config with what the arguments say set in it; `name` is where it comes from."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    if 'model' not in cfg:
        raise LeanError(f'{name} has no model.')
    settle_data(cfg, args.data_root, args.classes)
    if args.cfg_options:
        try:
            cfg.merge_from_dict(args.cfg_options)
        except (KeyError, TypeError, IndexError) as e:
            raise LeanError(f'--cfg-options do not fit the config: {e}') from e
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = str(Path('work_dirs') / Path(name).stem)
    return cfg


def _run(
        parser: argparse.ArgumentParser, argv: Sequence[str] | None, work: Callable[[argparse.Namespace], None],
) -> int:
    try:
        args = parser.parse_intermixed_args(argv)
    except RecursionError:  # MMEngine's parser, at a dict with a comma
        parser.error(_NO_DICTS)
    if 'dict(' in str(args.cfg_options or ''):  # one without is a string to it
        parser.error(_NO_DICTS)
    try:
        work(args)
    except LeanError as e:
        if args.debug:
            traceback.print_exc()
        print(f'{parser.prog}: {main_message(e)}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('\ninterrupted', file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def main_message(error: Exception) -> str:
    """An error in one line. Raised in a data loading process it carries that process's traceback in its text."""
    return ' '.join(re.split(r'\w*(?:Lean|Checkpoint)Error: ', str(error))[-1].split())
