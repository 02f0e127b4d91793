"""The channel counts that timm models keep beside their layers: of their features, their head and `feature_info`."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from .resize import feature_channels, set_feature_channels

__all__ = ['ModelSizes']

_HEAD_SIZES = ('in_features', 'num_features', 'hidden_size')


@dataclass
class ModelSizes:
    """Channel counts as measured by running a model.

    Attributes:
        features: Of `forward_features`.
        pooled: Of `forward_head(..., pre_logits=True)`, which the classifier reads.
        levels: Of the maps listed in `feature_info`.
    """
    features: int | None
    pooled: int | None
    levels: list[int]

    @classmethod
    def of(cls, model: Any, x: torch.Tensor) -> 'ModelSizes':
        with torch.no_grad():
            model.eval()
            features = pooled = None
            if hasattr(model, 'forward_features') and hasattr(model, 'forward_head'):
                maps = model.forward_features(x)
                features = maps.shape[1] if maps.ndim == 4 else maps.shape[-1]
                pooled = model.forward_head(maps, pre_logits=True).shape[1]
            return cls(features, pooled, _level_channels(model, x))

    def update(self, model: Any, x: torch.Tensor) -> None:
        """Set what has changed since, wherever the model said the same before."""
        now = ModelSizes.of(model, x)
        changes = [(self.features, now.features), (self.pooled, now.pooled)]
        for name, old_new in (('num_features', changes), ('head_hidden_size', changes[::-1])):
            _replace(model, name, old_new)
        head = getattr(model, 'head', None)
        if isinstance(head, nn.Module) and not isinstance(head, nn.Linear):
            for name in _HEAD_SIZES:
                _replace(head, name, changes)
        if now.levels and self.levels == feature_channels(model):
            set_feature_channels(model, now.levels)


def _replace(module: nn.Module, name: str, changes: Sequence[tuple[int | None, int | None]]) -> None:
    value = module.__dict__.get(name)
    for old, new in changes:
        if type(value) is int and value == old and new is not None:
            setattr(module, name, new)
            return


def _level_channels(model: Any, x: torch.Tensor) -> list[int]:
    """Channels of the maps that `feature_info` lists, measured; [] if there is no way to."""
    info = getattr(model, 'feature_info', None) or []
    entries = getattr(info, 'info', info)
    if hasattr(model, 'forward_intermediates'):
        try:
            maps = model.forward_intermediates(x, intermediates_only=True)
            if len(maps) == len(entries):
                return [m.shape[1] for m in maps]
        except (TypeError, ValueError, AssertionError, NotImplementedError):
            pass
    channels: dict[int, int] = {}
    handles = []
    for i, entry in enumerate(entries):
        try:
            module = model.get_submodule(entry.get('module', ''))
        except AttributeError:
            return []

        def hook(m: nn.Module, args: Any, output: Any, i: int = i, before: bool = 'hook_type' in entry) -> None:
            taken = args[0] if before and entries[i]['hook_type'] == 'forward_pre' else output
            if isinstance(taken, torch.Tensor):
                channels[i] = taken.shape[1]
        handles.append(module.register_forward_hook(hook))
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return [channels[i] for i in range(len(entries))] if len(channels) == len(entries) else []
