"""The neck's `in_channels`, from the backbone that feeds it.

A detector builds its backbone and its neck by separate registry calls, so neither sees the other. What sees both is the
detector's own config, at the moment a registry is asked to build it. There `'auto'` is replaced and a wrong list is
refused. That moment is the same in this package's tools, in MMDetection's `tools/train.py`, in `init_detector` and in a
user's `MODELS.build`.

Limits: detectors without a neck keep the channels their config gives; so do necks without `in_channels`.
"""
import functools
from collections.abc import Callable, MutableMapping
from typing import Any

from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry

from timm_lean.errors import LeanError

from .network import feature_channels

__all__ = ['install', 'resolve_channels']

AUTO = 'auto'
LAST_ONLY = ('CTResNetNeck', 'DilatedEncoder')
"""Necks that take the channels of the last feature map as a number."""
REVERSED = ('YOLOV3Neck',)
"""Necks that take the channels from the last feature map to the first."""

_BACKBONE_ARGS = ('model_name', 'checkpoint', 'out_indices', 'model_args')


def resolve_channels(model: Any) -> None:
    """Fill in or check `neck.in_channels` of a detector's config, in place; nothing to do for other configs.

    Args:
        model: A config with `backbone` and `neck`. Of several necks in a list the first is meant.

    Raises:
        LeanError: The channels given are not the backbone's; the message has the right ones.
    """
    if not isinstance(model, MutableMapping):
        return
    backbone, neck = model.get('backbone'), model.get('neck')
    if isinstance(neck, (list, tuple)) and neck:
        neck = neck[0]
    if not isinstance(backbone, MutableMapping) or not isinstance(neck, MutableMapping):
        return
    if _name(backbone) != 'TimmBackbone' or 'in_channels' not in neck:
        return
    channels = feature_channels(**{k: backbone[k] for k in _BACKBONE_ARGS if k in backbone})
    right: Any = channels
    if _name(neck) in LAST_ONLY:
        right = channels[-1]
    elif _name(neck) in REVERSED:
        right = channels[::-1]
    given = neck['in_channels']
    if given == AUTO:
        neck['in_channels'] = right
    elif (list(given) if isinstance(given, (list, tuple)) else given) != right:
        raise LeanError(f'neck.in_channels={given} does not fit the backbone {_describe(backbone)}: it must be '
                        f"{right}, or 'auto'.")


def install(*registries: Registry) -> None:
    """Make registries resolve the channels of every model they are asked to build. Idempotent."""
    for registry in (ROOT_MODELS, *registries):
        if not getattr(registry.build_func, 'resolves_channels', False):
            registry.build_func = _resolving(registry.build_func)


def _resolving(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def build_resolved(cfg: Any, *args: Any, **kwargs: Any) -> Any:
        resolve_channels(cfg)
        return build(cfg, *args, **kwargs)

    build_resolved.resolves_channels = True  # type: ignore[attr-defined]
    return build_resolved


def _name(cfg: Any) -> str:
    kind = cfg.get('type')
    return kind.rpartition('.')[2] if isinstance(kind, str) else getattr(kind, '__name__', '')


def _describe(backbone: Any) -> str:
    name = backbone.get('model_name') or backbone.get('checkpoint')
    return f'{name!r} with out_indices={tuple(backbone["out_indices"])}' if backbone.get('out_indices') else repr(name)
