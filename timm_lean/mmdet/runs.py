"""Images of a detector's training set to calibrate with, its accuracy, a short training: all by its own config."""
import contextlib
import copy
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from mmdet.registry import DATASETS
from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from timm_lean.checkpoint.recipe import has_step
from timm_lean.errors import LeanError

from .backbone import TimmBackbone
from .checks import registry_errors
from .data import datasets
from .detector import describe, load_strictly, write_detector
from .fit_machine import prepare
from .hooks import unwrap
from .own_data import settle_data
from .settings import parse_config

__all__ = ['CALIBRATION_IMAGES', 'calibration_images', 'detector_scores', 'finetune_detector', 'set_data']

CALIBRATION_IMAGES = 512
_BATCH = 4
_FACTOR = 0.1  # of the config's learning rate, for fine-tuning


def set_data(detector: Any, data_root: str | Path | None) -> None:
    """Move the data in a detector's config to another folder; None leaves it where the config says."""
    settle_data(detector.cfg, data_root)


def calibration_images(
        detector: Any, count: int = CALIBRATION_IMAGES, cfg: Config | None = None) -> Sequence[torch.Tensor]:
    """Images of the config's training set, spread over all of it and prepared as for a test: no augmentation, no boxes.

    They are in an order that is the same each time, and of which every beginning is spread over the set too: what has
    no room for all of them takes the first.

    Args:
        detector: With `cfg`, unless that is given.
        count: Images; all if there are fewer.
        cfg: The config.

    Returns:
        Batches `[B, 3, H, W]` on the detector's device, as its preprocessor hands them to the backbone. They are kept
        as the pipeline gives them, in bytes as a rule, and prepared whenever they are asked for: as floats they take
        four times the memory.

    Raises:
        LeanError: The config has no training set or its files are not there.
    """
    if type(count) is not int or count < 1:
        raise LeanError(f'A calibration needs a whole number of images of at least 1, got {count!r}.')
    cfg = detector.cfg if cfg is None else cfg
    found = list(datasets((cfg.get('train_dataloader') or {}).get('dataset')))
    tests = list(datasets((cfg.get('test_dataloader') or {}).get('dataset')))
    if not found or not tests or not tests[0].get('pipeline'):
        raise LeanError('The config has no train_dataloader and test_dataloader to take calibration images from.')
    settings = copy.deepcopy(found[0])
    settings['pipeline'] = copy.deepcopy(tests[0]['pipeline'])
    with registry_errors(), contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells how it loads
        try:
            dataset = DATASETS.build(settings)
        except FileNotFoundError as e:
            raise LeanError(f'The training set has no {e.filename}. Give the folder of the data by --data-root '
                            '(data_root), or do without calibration.') from e
    count = min(count, len(dataset))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return _Prepared([dataset[i * len(dataset) // count]['inputs'] for i in order], detector.data_preprocessor)


class _Prepared(Sequence[torch.Tensor]):
    """Batches of images, prepared when they are asked for."""

    def __init__(self, images: Sequence[torch.Tensor], preprocessor: Any):
        self._batches = [images[i:i + _BATCH] for i in range(0, len(images), _BATCH)]
        self._preprocessor = preprocessor

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return self._preprocessor(dict(inputs=list(self._batches[index])), training=False)['inputs']


def detector_scores(detector: Any) -> dict[str, float]:
    """A detector's metrics on its config's test set, by the config's own evaluator (`coco/bbox_mAP` for COCO).

    Raises:
        LeanError: The config has no evaluation, or its data are not there.
    """
    if not detector.cfg.get('test_dataloader') or not detector.cfg.get('test_evaluator'):
        raise LeanError('The config has no test_dataloader and test_evaluator, so nothing can be evaluated.')
    with _runner(detector, ('test',)) as runner:
        return {name: float(value) for name, value in runner.test().items()}


def finetune_detector(detector: Any, epochs: int, lr: float | None = None) -> nn.Module:
    """Train a detector further by its config: its data, losses and optimizer, the learning rate falling to zero.

    Kernels that are zero stay so. Hooks of the config are left out, they belong to its whole training.

    Args:
        detector: With `cfg` and `dataset_meta`; it is not changed.
        epochs: Over the training set.
        lr: Learning rate at the start; a tenth of the config's if None.

    Returns:
        A new detector in eval mode.

    Raises:
        LeanError: The config has no training, or its data are not there.
    """
    if type(epochs) is not int or epochs < 1:
        raise LeanError(f'Fine-tuning needs a whole number of epochs of at least 1, got {epochs!r}.')
    if lr is not None and not 0 < lr < float('inf'):
        raise LeanError(f'The learning rate of fine-tuning must be above 0, got {lr!r}.')
    for key in ('train_dataloader', 'optim_wrapper'):
        if not detector.cfg.get(key):
            raise LeanError(f'The config has no {key}, so nothing can be trained.')
    with _runner(detector, ('train',), epochs, lr) as runner:
        runner.train()
        trained: Any = copy.deepcopy(unwrap(runner.model)).cpu().eval()
    new = copy.deepcopy(detector)
    new.load_state_dict(trained.state_dict())
    return new.eval()


@contextlib.contextmanager
def _runner(detector: Any, splits: tuple[str, ...], epochs: int = 0, lr: float | None = None) -> Iterator[Runner]:
    """A Runner with a detector's structure and weights, which writes into a folder that goes at the end."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / 'detector.safetensors'
        write_detector(detector, weights)
        cfg = parse_config(describe(detector.cfg, detector, detector.dataset_meta)['config'])
        cfg.work_dir, cfg.log_level, cfg.custom_hooks = folder, 'WARNING', []
        cfg.default_hooks = dict(logger=dict(type='LoggerHook', interval=50), checkpoint=None)
        cfg.visualizer = None
        cfg.experiment_name = f'timm_lean_{os.path.basename(folder)}'  # MMEngine keeps one log per name
        for split in {'train', 'val', 'test'} - set(splits):
            cfg[f'{split}_dataloader'] = cfg[f'{split}_cfg'] = None
        for split in {'val', 'test'} - set(splits):
            cfg[f'{split}_evaluator'] = None
        evaluators = cfg.get('test_evaluator') or []
        for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
            evaluator.pop('outfile_prefix', None)  # where to write is not the file's to say
        if 'train' in splits:
            _set_finetuning(cfg, epochs, lr)
            if has_step(detector, 'prune_kernels') or (
                    isinstance(detector.backbone, TimmBackbone) and has_step(detector.backbone, 'prune_kernels')):
                cfg.custom_hooks = [dict(type='timm_lean.KernelPruningHook', target='')]
            cfg.load_from = str(weights)
        else:
            cfg.optim_wrapper = cfg.param_scheduler = None
        prepare(cfg, splits)
        with registry_errors():
            runner = Runner.from_cfg(cfg)
            load_strictly(unwrap(runner.model), weights)
            yield runner


def _set_finetuning(cfg: Config, epochs: int, lr: float | None) -> None:
    optimizer = cfg.optim_wrapper.optimizer
    optimizer.lr = lr if lr is not None else _FACTOR * optimizer.lr
    cfg.train_cfg = ConfigDict(type='EpochBasedTrainLoop', max_epochs=epochs, val_interval=epochs + 1)
    cfg.param_scheduler = [dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=epochs, T_max=epochs,
                                convert_to_iter_based=True)]
    cfg.auto_scale_lr = None

