"""What a detector is: its config and, in it, the structural steps taken on the whole of it.

A classification network is a timm name plus steps; a detector is a config plus steps, `model.lean_steps`, whose module
names start at the detector's root:

    model = dict(type='RTMDet', backbone=..., neck=..., bbox_head=..., lean_steps=[dict(op='share', groups=[...])])

The detector is built as the config says and the steps are taken then, at the moment a registry is asked for it: in
this package's tools, in MMDetection's `tools/train.py`, in `init_detector` and in a user's `MODELS.build` alike. The
steps are the ones that classification networks know (`checkpoint/recipe.py`). Those within a `TimmBackbone`, taken on
the timm network it comes from, are in its own recipe.
"""
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry

from timm_lean.checkpoint.recipe import apply_steps, has_step
from timm_lean.errors import LeanError

__all__ = ['STEPS_KEY', 'install', 'set_steps', 'steps_of', 'take_steps']

STEPS_KEY = 'lean_steps'
_PLUGIN = 'timm_lean.mmdet'


def install(*registries: Registry) -> None:
    """Let registries take the steps in the config of every model they are asked to build. Idempotent."""
    for registry in (ROOT_MODELS, *registries):
        if not getattr(registry.build_func, 'takes_steps', False):
            registry.build_func = _stepping(registry.build_func)


def steps_of(cfg: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps in a detector's config, as plain data.

    Raises:
        LeanError: They are no list.
    """
    model = cfg.get('model')
    return _checked(model.get(STEPS_KEY)) if isinstance(model, Mapping) else []


def set_steps(cfg: Config, steps: list[dict[str, Any]]) -> None:
    """Write steps into a config, in place; whoever reads it has to import the plugin first, so it says that too."""
    cfg.model.pop(STEPS_KEY, None)
    if not steps:
        return
    cfg.model[STEPS_KEY] = steps
    imports = cfg.get('custom_imports') or {}
    names = imports.get('imports', []) if isinstance(imports, Mapping) else imports
    names = [names] if isinstance(names, str) else list(names)
    if not any(name == _PLUGIN or name.startswith(f'{_PLUGIN}.') for name in names):
        cfg.custom_imports = dict(imports=[_PLUGIN, *names], allow_failed_imports=False)


def take_steps(model: nn.Module, steps: list[dict[str, Any]]) -> nn.Module:
    """Take steps on a newly built detector.

    Raises:
        LeanError: They are not for this detector; the message says which step.
    """
    steps = _checked(steps)
    try:
        model = apply_steps(model, steps)
        measure = getattr(getattr(model, 'backbone', None), 'measure_channels', None)
        if measure is not None and has_step(model, 'resize'):
            measure()
        return model
    except LeanError as e:
        raise LeanError(f'The {STEPS_KEY} in the config are not for this {type(model).__name__}: {e} Give the config '
                        'of the detector that was changed.') from e


def _stepping(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_stepping(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(cfg, Mapping) or STEPS_KEY not in cfg:
            return build(cfg, *args, **kwargs)
        steps = cfg[STEPS_KEY]
        kind: Any = type(cfg)
        rest = kind({key: value for key, value in cfg.items() if key != STEPS_KEY})
        return take_steps(build(rest, *args, **kwargs), steps)

    build_stepping.takes_steps = True  # type: ignore[attr-defined]
    return build_stepping


def _checked(steps: Any) -> list[dict[str, Any]]:
    if steps is not None and not isinstance(steps, (list, tuple)):
        raise LeanError(f'{STEPS_KEY} must be a list of structural steps, got {repr(steps)[:100]}.')
    return _plain(steps or [])


def _plain(value: Any) -> Any:
    """MMEngine's dicts as dicts, and tuples as lists: what JSON would give back."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
