"""MMEngine hooks that change a detector's structure once, when its training begins and its weights are there.

    custom_hooks = [dict(type='timm_lean.ShareHook', params=0.5, target='backbone')]

The detector object stays the one that MMEngine and the other hooks know, its parts are replaced. What is built for
parameters is built anew: the optimizer and its schedules, the average of an `EMAHook`, the wrapper of DDP. Checkpoints
say the structure, so that a resumed training takes it over before it loads them.
"""
import copy
from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn as nn
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper

from timm_lean.checkpoint.recipe import has_step
from timm_lean.errors import LeanError
from timm_lean.pruning import prune_channels
from timm_lean.sharing import share

from .adopt import STEPS_META
from .arguments import check_arguments
from .hooks import unwrap
from .runs import calibration_images
from .scope import HOOKS, register
from .structure import take_steps
from .verbs import lean_detector

__all__ = ['ChannelPruningHook', 'ShareHook']


class _StructureHook(Hook):
    """What both hooks do; see there."""
    # Before all others: they look at the detector's layers, and EMAHook loads its average.
    priority = 'VERY_HIGH'
    verb: ClassVar[Any]
    step: ClassVar[str]

    def __init__(self, target: str | Sequence[str], calibrate: int, options: dict[str, Any]):
        name = type(self).__name__
        check_arguments(self.verb, options, name)
        if type(calibrate) is not int or calibrate < 0:
            raise LeanError(f'{name}: calibrate must be a number of images of at least 0, got {calibrate!r}.')
        self.target, self.calibrate, self.options = target, calibrate, options

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        steps = checkpoint.get('meta', {}).get(STEPS_META)
        if not runner._resume or not steps:  # else the config has taken over what load_from says
            return
        detector = unwrap(runner.model)
        own = getattr(detector, 'lean_steps', [])
        if own != steps[:len(own)]:
            raise LeanError(f'{type(self).__name__}: the checkpoint to resume from is of another structure than the '
                            'config describes. Resume with the config and the load_from that the training began with.')
        if missing := steps[len(own):]:
            new = take_steps(copy.deepcopy(detector), missing)
            _put(runner, new)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint['meta'][STEPS_META] = list(getattr(unwrap(runner.model), 'lean_steps', []))

    def before_train(self, runner: Any) -> None:
        detector: Any = unwrap(runner.model)
        name = type(self).__name__
        if sum(type(hook) is type(self) for hook in runner.hooks) > 1:
            raise LeanError(f'{name} is in the config twice (custom_hooks of a base config count too). Keep one; its '
                            'target may be a list.')
        if has_step(detector, self.step):
            runner.logger.info(f'{name}: the detector has been through this before; nothing is changed.')
            return
        if runner.iter > 0:
            raise LeanError(f'{name}: the training that is resumed began without it. Begin a new one with load_from='
                            'CHECKPOINT.')
        options = dict(self.options)
        if self.calibrate:
            options['calibration'] = calibration_images(detector, self.calibrate, runner.cfg)
        new = lean_detector(detector, self.verb, target=self.target, **options)
        runner.logger.info(f'{name}:\n{new.lean_report}')
        if self.calibrate:
            runner.logger.info(new.calibration_report.summary)  # type: ignore[union-attr]
        _put(runner, new)


@register(HOOKS)
class ShareHook(_StructureHook):
    """Converts a trained detector to shared filter bases when a training begins, see `timm_lean.share`.

    Args:
        target: Part of the detector to convert, by name, or several; '' for all of it.
        calibrate: Repair the result by so many images of the training set; 0: not.
        **options: Of `timm_lean.share`: `params` (a share of the whole detector's), `energy` or `shared_rank`, ...

    Raises:
        LeanError: Options or a target that cannot be used, a training resumed that began without this hook.
    """
    verb, step = staticmethod(share), 'share'

    def __init__(self, target: str | Sequence[str] = 'backbone', calibrate: int = 0, **options: Any):
        super().__init__(target, calibrate, options)


@register(HOOKS)
class ChannelPruningHook(_StructureHook):
    """Removes channels of a trained detector when a training begins, see `timm_lean.prune_channels`.

    Args:
        pruning_ratio: Share of the channels to remove.
        target: Part of the detector whose layers lose outputs, by name, or several; '' for all of it.
        calibrate: Repair the result by so many images of the training set; 0: not.
        **options: Of `timm_lean.prune_channels`.

    Raises:
        LeanError: As `ShareHook`.
    """
    verb, step = staticmethod(prune_channels), 'resize'

    def __init__(
            self, pruning_ratio: float = 0.5, target: str | Sequence[str] = '', calibrate: int = 0, **options: Any):
        super().__init__(target, calibrate, {'pruning_ratio': pruning_ratio, **options})


def _put(runner: Any, new: nn.Module) -> None:
    """Let a run go on with another structure and its weights."""
    cfg = runner.cfg
    if not cfg.get('optim_wrapper'):
        raise LeanError('The structure of a detector changes by hooks only where the config has an optim_wrapper, from '
                        'which the optimizer is built anew.')
    detector = unwrap(runner.model)
    new.to(next(detector.parameters()).device)
    _become(detector, new)
    if is_model_wrapper(runner.model):
        runner.model = runner.wrap_model(cfg.get('model_wrapper_cfg'), detector)
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            average = hook.ema_model
            _become(unwrap(average.module), copy.deepcopy(new).requires_grad_(False))
            average.avg_parameters = (
                average.module.state_dict() if average.update_buffers else dict(average.module.named_parameters()))
    runner.optim_wrapper = runner.build_optim_wrapper(copy.deepcopy(cfg.optim_wrapper))
    runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
    if cfg.get('param_scheduler'):
        runner.param_schedulers = runner.build_param_scheduler(copy.deepcopy(cfg.param_scheduler))
    runner.optim_wrapper.initialize_count_status(runner.model, runner.iter, runner.max_iters)


def _become(detector: nn.Module, new: nn.Module) -> None:
    """Give a detector the parts of another one, in place; what prepares its images stays."""
    preprocessor = detector._modules.get('data_preprocessor')
    detector._modules = dict(new._modules)
    if preprocessor is not None:
        detector._modules['data_preprocessor'] = preprocessor
    detector._parameters, detector._buffers = new._parameters, new._buffers
    detector.lean_steps = list(new.lean_steps)  # type: ignore[assignment, arg-type]
