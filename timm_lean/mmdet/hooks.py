"""MMEngine hooks: regularizers in the loss, and checkpoints as safetensors.

Both are thin: the terms come from `timm_lean.regularizers`, as in classification, and the file from `detector.py`.
"""
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import EpochBasedTrainLoop

from timm_lean.errors import CheckpointError, LeanError
from timm_lean.regularizers import create_regularizer, loss_terms, set_progress

from .adopt import STEPS_META
from .backbone import TimmBackbone
from .detector import describe, note_pruned, save_detector
from .scope import HOOKS, register
from .weights import detector_header

__all__ = ['PRUNINGS', 'RegularizerHook', 'SafetensorsHook']

PRUNINGS = 'timm_lean_prunings'
"""Entry in MMEngine's message hub: how often this run has pruned its detector so far."""


@register(HOOKS)
class RegularizerHook(Hook):
    """Adds regularizers to a detector's losses.

    Each appears in the log as `loss_<name>`, weighted and part of the total, and as `<name>`, unweighted. They are
    computed in fp32 inside the model's forward pass in mode `'loss'`: within DDP's forward, under the loss scale of
    AMP, and summed by the detector's own `parse_losses`. Where the detector has a loss of that name itself (YOLOX has
    `loss_l1`) the term becomes `<name>_reg`.

    Args:
        regularizers: What `timm_lean.create_regularizer` takes, `[dict(type='basis_ortho', weight=10), ...]`;
            `schedule='cosine'` and the like let the weight follow the training.
        target: Submodule they act on, by name; '' for the whole detector.

    Raises:
        LeanError: An unknown regularizer or target, nothing in the target to act on, or a second such hook.
    """

    def __init__(self, regularizers: Sequence[dict[str, Any]], target: str = 'backbone'):
        if not isinstance(regularizers, (list, tuple)) or not regularizers:
            raise LeanError("RegularizerHook needs regularizers=[dict(type='basis_ortho', weight=10), ...], got "
                            f'{regularizers!r}.')
        self.regularizers = []
        for cfg in regularizers:
            if not isinstance(cfg, Mapping) or 'type' not in cfg:
                raise LeanError(f"A regularizer must be dict(type=NAME, weight=...), got {cfg!r}.")
            self.regularizers.append(create_regularizer(cfg['type'], **{k: v for k, v in cfg.items() if k != 'type'}))
        self.target = target
        self._handle: Any = None

    def before_train(self, runner: Any) -> None:
        if sum(isinstance(hook, RegularizerHook) for hook in runner.hooks) > 1:
            raise LeanError('RegularizerHook is in the config twice (custom_hooks of a base config count too). Put all '
                            'regularizers into one.')
        model = unwrap(runner.model)
        target = submodule(model, self.target, 'RegularizerHook')
        set_progress(self.regularizers, _progress(runner))
        with torch.no_grad():
            loss_terms(self.regularizers, target)  # fails now, not in the first iteration, if there is nothing to do

        def add_terms(module: nn.Module, args: tuple, kwargs: dict, losses: Any) -> Any:
            mode = kwargs.get('mode', args[2] if len(args) > 2 else 'tensor')
            return _with_terms(losses, loss_terms(self.regularizers, target)) if mode == 'loss' else None

        self._handle = model.register_forward_hook(add_terms, with_kwargs=True)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        set_progress(self.regularizers, _progress(runner))

    def after_train(self, runner: Any) -> None:
        self._remove()

    def after_run(self, runner: Any) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


@register(HOOKS)
class SafetensorsHook(Hook):
    """Writes `last.safetensors` and `best.safetensors`, each atomically, with all that is needed to load them.

    The weights are those that are evaluated: the average, if there is an EMAHook. MMEngine's own CheckpointHook stays
    what training is resumed from. While a detector is being pruned, the best one is the best since the last pruning,
    so that it is as small as the last.

    Args:
        metric: Metric of the best checkpoint; the first one if 'auto' (COCO: `coco/bbox_mAP`).
        greater: Whether more is better.
        interval: Write `last` every so many epochs, and after the last one.
        out_dir: Folder; the run's work_dir if None.
    """
    # Before EMAHook (NORMAL) puts the plain weights back after an evaluation.
    priority = 'ABOVE_NORMAL'

    def __init__(self, metric: str = 'auto', greater: bool = True, interval: int = 1, out_dir: str | None = None):
        if not isinstance(interval, int) or interval < 1:
            raise LeanError(f'SafetensorsHook: interval must be a whole number of at least 1, got {interval!r}.')
        self.metric, self.greater, self.interval, self.out_dir = metric, greater, interval, out_dir
        self.best: float | None = None
        self._prunings = 0  # before the best one
        self._header: dict[str, Any] = {}
        self._structure: Any = None

    def before_train(self, runner: Any) -> None:
        if runner.rank != 0:
            return
        note_pruned(unwrap(runner.model))
        metainfo = getattr(runner.train_dataloader.dataset, 'metainfo', {})
        self._header = describe(runner.cfg, unwrap(runner.model), metainfo)
        self._structure = _structure(unwrap(runner.model))
        if runner._resume and self._path(runner, 'best').is_file():
            try:
                header = detector_header(self._path(runner, 'best'))
                self.best, self._prunings = header.get('score'), header.get('prunings', 0)
            except CheckpointError as e:
                runner.logger.warning(f'{e} The best checkpoint starts anew.')

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint['meta'][STEPS_META] = list(getattr(unwrap(runner.model), 'lean_steps', []))

    def after_train_epoch(self, runner: Any) -> None:
        if runner.rank == 0 and (self.every_n_epochs(runner, self.interval) or self.is_last_train_epoch(runner)):
            # the counter moves after this
            self._save(runner, 'last', evaluated_model(runner), epoch=runner.epoch + 1)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        if runner.rank != 0 or not self._header or not metrics:
            return
        model = unwrap(runner.model)
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            self._save(runner, 'last', model, epoch=runner.epoch)
        name = next(iter(metrics)) if self.metric == 'auto' else self.metric
        if name not in metrics:
            raise LeanError(f'SafetensorsHook: there is no metric {name!r}. The evaluation gave {", ".join(metrics)}.')
        score, prunings = float(metrics[name]), runner.message_hub.get_info(PRUNINGS, 0)
        # the first is the best so far, whatever its value: an early AP is often 0 and may be nan
        if self.best is None or prunings != self._prunings or (
                score > self.best if self.greater else score < self.best):
            self.best, self._prunings = score, prunings
            self._save(runner, 'best', model, epoch=runner.epoch, metric=name, score=score, prunings=prunings)

    def after_train(self, runner: Any) -> None:
        if self.best is not None and runner.message_hub.get_info(PRUNINGS, 0) != self._prunings:
            runner.logger.warning(f'{self._path(runner, "best")} is from before the pruning ended: nothing was '
                                  'evaluated after that. Let the schedule end earlier or evaluate at the end.')

    def _save(self, runner: Any, name: str, model: nn.Module, **extra: Any) -> None:
        detector = unwrap(runner.model)
        if _structure(detector) != self._structure:  # it has been changed since
            self._header = describe(runner.cfg, detector, self._header['metainfo'])
            self._structure = _structure(detector)
        save_detector(model, self._path(runner, name), {**self._header, **extra})

    def _path(self, runner: Any, name: str) -> Path:
        return Path(self.out_dir or runner.work_dir) / f'{name}.safetensors'


def _structure(detector: nn.Module) -> Any:
    """The steps taken so far, those in the backbone's own recipe too."""
    backbone = getattr(detector, 'backbone', None)
    recipe = asdict(backbone.recipe) if isinstance(backbone, TimmBackbone) else None
    return recipe, list(getattr(detector, 'lean_steps', []))


def unwrap(model: nn.Module) -> nn.Module:
    """The detector inside DDP and the like."""
    return unwrap(model.module) if is_model_wrapper(model) else model  # type: ignore[arg-type]


def submodule(model: nn.Module, name: str, user: str) -> nn.Module:
    """A submodule by name; '' is the model itself."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        children = ', '.join(child for child, _ in model.named_children())
        raise LeanError(f'{user}: the detector has no {name!r}. It has {children}.') from None


def evaluated_model(runner: Any) -> nn.Module:
    """The detector whose weights an evaluation would use."""
    averaged = [hook.ema_model.module for hook in runner.hooks if isinstance(hook, EMAHook)]
    return unwrap(averaged[0] if averaged else runner.model)


def _with_terms(losses: Mapping[str, Any], terms: Mapping[str, Any]) -> dict[str, Any]:
    """A detector's losses and the regularizers' terms; none of the former is replaced by one of the latter."""
    taken = {name.removeprefix('loss_') for name in terms if name in losses}
    renamed = {f'{name}_reg' if name.removeprefix('loss_') in taken else name: term for name, term in terms.items()}
    return {**losses, **renamed}


def _progress(runner: Any) -> float:
    return runner.iter / max(runner.max_iters, 1)
