"""A detector is first built without memory for its tensors, to see that it is the one a file holds.

A config of a few kilobytes can ask for a head of 20,000 convolutions, or for one of a terabyte. On the device `meta`
either costs modules and calls alone, which `checkpoint/limits.py` counts; only what then has exactly the tensors of the
file is built for good.
"""
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.runner import get_state_dict
from torch.overrides import TorchFunctionMode

from timm_lean.checkpoint.limits import Work, check_numbers, check_steps, check_tensors, limited
from timm_lean.errors import CheckpointError

from .backbone import TimmBackbone
from .structure import set_steps, steps_of

__all__ = ['check_work', 'misfit', 'tied_names']

_NUMBERS = 200_000  # sum of the whole numbers in a model's config; the largest of MMDetection's, for V3Det, has 98,509
# Bytes while building beyond those of the file's tensors: a backbone is built up to four times, and one that was cut
# starts as the whole network.
_TIMES, _SLACK = 8, 200 * 2 ** 20


def check_work(
        build: Callable[[Config], nn.Module], cfg: Config, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Build a config's detector as a skeleton and compare it with the tensors of a file.

    Args:
        build: Builds the detector of a config, `build_detector`.
        cfg: Checked by `trust.check_config`.
        shapes: Of the file's tensors.
        source: The file, for messages.

    Raises:
        CheckpointError: It takes more work than these tensors justify, or has others.
    """
    architecture = _architecture(cfg)
    try:
        check_tensors(shapes)
        steps = steps_of(cfg)
        check_steps(steps)
        plain = copy.deepcopy(cfg)
        set_steps(plain, [])
        check_numbers(_counts(plain.model), shapes, _NUMBERS)  # steps make nothing larger that they are given
        if steps:  # they may take more work than a detector, on a detector that is not too much by itself
            with limited(shapes, architecture, cpu_memory=True), torch.device('meta'), _Ramps():
                build(plain)
        with limited(shapes, architecture, steps=bool(steps), cpu_memory=True) as work, torch.device('meta'), _Ramps():
            model = build(cfg)
    except CheckpointError as e:
        raise e if source in str(e) else CheckpointError(f'{source} cannot be loaded: {e}') from e
    _check_bytes(work, shapes, source)
    given = dict(shapes)
    if isinstance(getattr(model, 'backbone', None), TimmBackbone):
        model.backbone.adopt_names(given, 'backbone.')  # type: ignore[union-attr, operator]
    if found := misfit({k: tuple(v.shape) for k, v in get_state_dict(model).items()}, given, tied_names(model)):
        raise CheckpointError(f'{source} does not hold the detector its config describes: {found}.')


def misfit(
        own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], tied: set[str], part: str = '',
) -> str:
    """What does not fit between a detector's tensors and those of a checkpoint, by shapes; '' if all does.

    Args:
        own: Of the detector.
        given: Of the checkpoint.
        tied: Further names of the detector's tensors, which a checkpoint may have too.
        part: Compare only the names that start with this.
    """
    missing = [k for k in own if k.startswith(part) and k not in given and not k.endswith('num_batches_tracked')]
    unexpected = [k for k in given if k.startswith(part) and k not in own and k not in tied]
    wrong = [f'{k} {list(given[k])} instead of {list(own[k])}'
             for k in own if k.startswith(part) and k in given and given[k] != own[k]]
    return '; '.join(
        f'{label} {", ".join(keys[:3])}' + (f' and {len(keys) - 3} more' if len(keys) > 3 else '')
        for label, keys in (('missing', missing), ('unexpected', unexpected), ('other shape', wrong)) if keys)


def tied_names(model: nn.Module) -> set[str]:
    """Names under which modules used in several places could be written too."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False)}


def _counts(value: Any) -> Any:
    """The part of a config that says how many there are of something; ranges of regression reach to 1e8, as floats."""
    if isinstance(value, Mapping):
        return [_counts(item) for item in value.values()]
    if isinstance(value, (list, tuple, set)):
        return [_counts(item) for item in value]
    return value if isinstance(value, int) else 0


def _architecture(cfg: Config) -> str:
    """The timm name of a detector's backbone, where it has one."""
    backbone = cfg.model.get('backbone')
    if not isinstance(backbone, Mapping):
        return ''
    name = (backbone.get('model_args') or {}).get('base') or backbone.get('model_name')
    return name if isinstance(name, str) else ''


class _Ramps(TorchFunctionMode):
    """Rates that grow from block to block get values on every device: constructors read them as numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {**(kwargs or {}), 'device': 'cpu'} if func is torch.linspace else kwargs or {}
        return func(*args, **kwargs)


def _check_bytes(work: Work, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    size = 4 * sum(torch.Size(shape).numel() for shape in shapes.values())
    if work.bytes > _TIMES * size + _SLACK:
        raise CheckpointError(f'{source}: building the detector would take {work.bytes >> 20:,} MB beside '
                              f'{size >> 20:,} MB of tensors; the file is damaged.')
