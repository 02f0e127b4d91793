"""The techniques on a whole detector: `share`, `prune_kernels`, `prune_channels` and `remove_blocks` by one function.

    detector = open_detector('rtmdet_tiny.pth', 'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py')
    small = lean_detector(detector, timm_lean.share, params=0.5)
    write_detector(small, 'small.safetensors')

They are the functions that classification networks go through; names of modules start at the detector's root. Layers
that predict keep their outputs, and `share` leaves them as they are without `classifier=True`, as it does a classifier.
What is left alone is in the report.
"""
import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn

from timm_lean.calibration import Calibration
from timm_lean.checkpoint.recipe import has_step
from timm_lean.errors import LeanError
from timm_lean.pruning import prune_channels

from .backbone import TimmBackbone
from .hooks import submodule
from .on_images import forget, image_samples, on_images, prediction_layers, runnable_part, traceable_parts
from .report import test_size

__all__ = ['check_runs', 'lean_detector', 'target_patterns']

_SIDE = 128  # pixels of the images that a detector is traced with, where it takes such small ones
_logger = logging.getLogger(__name__)


def lean_detector(
        detector: nn.Module,
        verb: Callable[..., nn.Module],
        *,
        target: str | Sequence[str] = '',
        calibration: Calibration | Iterable[Any] | None = None,
        image_size: int | None = None,
        **options: Any,
) -> nn.Module:
    """Apply a technique to a detector.

    Args:
        detector: From `open_detector` or `load_detector`; any detector of MMDetection. It is not changed.
        verb: `timm_lean.share`, `timm_lean.prune_kernels`, `timm_lean.prune_channels` or `timm_lean.remove_blocks`.
        target: Only the layers in this part, `backbone`, `neck`, `bbox_head` or any module by name, or in these parts;
            '' for the whole detector. Shares of parameters are of the whole detector all the same.
        calibration: Images of the training set as the detector's preprocessor hands them on, in batches
            `[B, 3, H, W]`; see `data.calibration_images`.
        image_size: Side of the images it is traced with, no effect on the result; by itself if None.
        options: Of the verb.

    Returns:
        A new detector in the given one's mode, with the verb's report as `.lean_report`, its steps as `.lean_steps` and
        `cfg` and `dataset_meta` of the given one.

    Raises:
        LeanError: A target that does not exist, what the verb refuses, or a detector that cannot be traced.
    """
    include = target_patterns(detector, target, options.pop('include', None))
    if include is not None:
        options['include'] = include
    if calibration is not None:
        options['calibration'] = calibration
    run = _prune_channels if verb is prune_channels else _run
    new = run(detector, verb, _example(detector, image_size), options)
    _settle_backbone(new)
    return new


def target_patterns(detector: nn.Module, target: str | Sequence[str], include: Any = None) -> Any:
    """Patterns of the modules in a target, for a verb's `include`; what was given as that if there is no target."""
    targets = [name for name in ([target] if isinstance(target, str) else target) if name]
    if not targets:
        return include
    if include is not None:
        raise LeanError(f'target={target!r} and include={include!r} both choose layers; give one of them.')
    return [f'{name}.*' if any(submodule(detector, name, 'target').children()) else name for name in targets]


def _run(detector: Any, verb: Callable[..., Any], x: torch.Tensor, options: dict[str, Any]) -> Any:
    parameters = inspect.signature(verb).parameters
    part = runnable_part(detector, x)
    predictions = prediction_layers(detector, x) if part == 'whole' and 'classifier' in parameters else []
    with on_images(detector, part, predictions):
        if 'example_input' in parameters:
            options = {'example_input': x, **options}
        new = verb(detector, **options)
    forget(new)
    return new


def _prune_channels(detector: Any, verb: Callable[..., Any], x: torch.Tensor, options: dict[str, Any]) -> Any:
    """Prune as much of the detector as can be traced and then still runs."""
    errors: dict[str, str] = {}
    for part in traceable_parts(detector):
        try:
            with on_images(detector, part):
                new = verb(detector, x, **options)
            forget(new)
            check_runs(new, detector, x)
        except LeanError as e:
            errors[part] = str(e)
            continue
        if part != 'whole':
            reason = _joined(errors) or 'The attention behind them reshapes channels, which is not traced.'
            why = f'the detector was traced up to its {part} only, which keep their channels. {reason}'
            _logger.warning(f'Channel pruning of {type(detector).__name__}: {why}')
            report = new.lean_report
            new.lean_report = replace(report, unchanged=(*report.unchanged, (f'all behind the {part}', why)))
        return new
    if len(set(errors.values())) == 1:  # not about tracing, but about what was asked for
        raise LeanError(next(iter(errors.values())))
    raise LeanError(f'{type(detector).__name__} can lose no channels. {_joined(errors)} Kernels and shared bases do '
                    'without tracing.')


def _joined(errors: dict[str, str]) -> str:
    return ' '.join(f'{part}: {error}' for part, error in errors.items())


def check_runs(new: nn.Module, old: nn.Module, x: torch.Tensor) -> None:
    """Predict with a copy of a pruned detector, or run what the old one can: what was not traced may read what went.

    Raises:
        LeanError: The new one cannot do what the old one can.
    """
    for mode in ('predict', 'tensor'):
        if (problem := _problem(new, x, mode)) is None:
            return
        if _problem(old, x, mode) is None:
            raise LeanError(f'After pruning it does not run any more ({problem}).')


@torch.no_grad()
def _problem(detector: Any, x: torch.Tensor, mode: str) -> str | None:
    """What goes wrong when a detector is run; None if it runs."""
    try:
        copy.deepcopy(detector).eval()(x, image_samples(x), mode=mode)
    except Exception as e:  # whatever its layers raise at shapes they were not made for
        return f'{type(e).__name__}: {str(e).partition(chr(10))[0][:150]}'
    return None


@torch.no_grad()
def _example(detector: Any, side: int | None) -> torch.Tensor:
    """An image `[1, 3, H, W]` that the detector's backbone takes."""
    sides = [side] if side else [_SIDE, test_size(getattr(detector, 'cfg', {}))]
    error: Exception | None = None
    device = next(detector.parameters()).device
    modes = [(module, module.training) for module in detector.modules()]
    detector.eval()
    try:
        for side in sides:
            x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
            try:
                detector.extract_feat(x)
                return x
            except Exception as e:  # too small an image fails in as many ways as there are layers
                error = e
    finally:
        for module, training in modes:
            module.training = training
    raise LeanError(f'{type(detector).__name__} does not take images of {" or ".join(map(str, sides))} pixels: '
                    f'{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}')


def _settle_backbone(detector: Any) -> None:
    """Tell a `TimmBackbone` how many channels it has now."""
    if isinstance(getattr(detector, 'backbone', None), TimmBackbone) and has_step(detector, 'resize'):
        detector.backbone.measure_channels()
