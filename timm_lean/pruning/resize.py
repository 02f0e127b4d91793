"""The structural step `resize`: a network with other channel counts, as data.

What pruning changed is found by comparing the network with a freshly built one: shapes of parameters and buffers, whole
numbers among the modules' attributes, and the channels in `feature_info`. Only differences are stored, so a recipe says
for each module what it has now, and rebuilding needs neither pickled modules nor tracing.
"""
from typing import Any

import torch
import torch.nn as nn

from timm_lean.checkpoint.recipe import build, recipe_of, record_step, register_step
from timm_lean.errors import LeanError

__all__ = ['feature_channels', 'record_resize', 'resize', 'set_feature_channels']

STEP = 'resize'
# What pruning does not change: the head, and how a layer moves over its input.
_SKIPPED = {'num_classes', 'training', 'kernel_size', 'stride', 'padding', 'dilation', 'output_padding'}


def record_resize(model: nn.Module, before: nn.Module) -> None:
    """Note on a model how it differs in size from what it was.

    Of a timm model the note is about what its recipe builds, and takes the place of such a note right before.

    Args:
        model: The model.
        before: What it was before it lost channels.

    Raises:
        LeanError: Modules were added or taken out.
    """
    if not (getattr(model, 'pretrained_cfg', None) or {}).get('architecture'):
        if modules := _differences(before, model):
            record_step(model, STEP, modules=modules)
        return
    recipe = recipe_of(model)
    while recipe.steps and recipe.steps[-1]['op'] == STEP:
        recipe.steps.pop()
    with torch.device('meta'):
        fresh = build(recipe)
    modules = _differences(fresh, model)
    channels = feature_channels(model)
    model.lean_steps = recipe.steps  # type: ignore[assignment]
    if modules or channels != feature_channels(fresh):
        record_step(model, STEP, modules=modules, **({'feature_channels': channels} if channels else {}))


@register_step(STEP)
def resize(
        model: nn.Module, modules: dict[str, dict[str, Any]], feature_channels: list[int] | None = None) -> nn.Module:
    """Give modules the sizes a pruned network has, in place.

    Args:
        model: The network; its values do not matter.
        modules: Name to what differs: shapes of tensors (None for a size that stays), whole numbers, or tuples of
            them. A `bias` may be added; nothing may grow or become less than 1.
        feature_channels: Channels in `feature_info`.

    Raises:
        LeanError: A module or attribute that is not there, or a size that makes no sense.
    """
    if not isinstance(modules, dict):
        raise LeanError(f'The step {STEP!r} needs modules={{name: sizes}}, got {str(modules)[:100]!r}.')
    named = dict(model.named_modules())
    for name, changes in modules.items():
        if name not in named or not isinstance(changes, dict):
            raise LeanError(f'The step {STEP!r} has sizes for {name!r}, which {type(model).__name__} does not have.')
        for attribute, value in changes.items():
            _apply(named[name], name, attribute, value)
        _check_layer(named[name], name)
    if feature_channels is not None:
        set_feature_channels(model, feature_channels)
    return model


def feature_channels(model: nn.Module) -> list[int]:
    """The channels listed in a timm model's `feature_info`, [] if it has none."""
    info = getattr(model, 'feature_info', None) or []
    return [int(entry['num_chs']) for entry in getattr(info, 'info', info)]


def set_feature_channels(model: nn.Module, channels: list[int]) -> None:
    """Write channels into `feature_info`; its entries are copied, for they may be shared between models."""
    holder: Any = getattr(model, 'feature_info', None) or []
    entries = getattr(holder, 'info', holder)
    if (not isinstance(channels, list) or len(channels) != len(entries)
            or any(type(c) is not int or c < 1 for c in channels)):
        raise LeanError(f'{type(model).__name__} has {len(entries)} feature levels, got the channels '
                        f'{str(channels)[:100]}.')
    entries = [{**entry, 'num_chs': c} for entry, c in zip(entries, channels, strict=True)]
    if hasattr(holder, 'info'):
        holder.info = entries
    else:
        model.feature_info = entries  # type: ignore[assignment]


def _differences(fresh: nn.Module, model: nn.Module) -> dict[str, dict[str, Any]]:
    old, new = dict(fresh.named_modules()), dict(model.named_modules())
    if old.keys() != new.keys():
        raise LeanError(f'The model has other modules than {type(model).__name__} is built with: '
                        f'{", ".join(sorted(old.keys() ^ new.keys())[:3])}.')
    result = {}
    for name, module in new.items():
        changes: dict[str, Any] = {}
        for kind in ('_parameters', '_buffers'):
            for key, tensor in getattr(module, kind).items():
                before = getattr(old[name], kind).get(key)
                if tensor is not None and (before is None or before.shape != tensor.shape):
                    sizes = [None] * tensor.ndim if before is None else before.shape
                    changes[key] = [n if n != m else None for n, m in zip(tensor.shape, sizes, strict=True)]
        for key, value in module.__dict__.items():
            before = old[name].__dict__.get(key)
            if key[0] != '_' and key not in _SKIPPED and _is_size(value) and _is_size(before) and value != before:
                changes[key] = value if isinstance(value, int) else list(value)
        if changes:
            result[name] = changes
    return result


def _is_size(value: Any) -> bool:
    return type(value) is int or (isinstance(value, tuple) and bool(value) and all(type(v) is int for v in value))


def _apply(module: nn.Module, name: str, attribute: str, value: Any) -> None:
    wrong = LeanError(f'The step {STEP!r} cannot set {name}.{attribute} to {str(value)[:100]}.')
    kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for tensors in kinds:
        if attribute not in tensors:
            continue
        old = tensors[attribute]
        if old is None:
            weight = getattr(module, 'weight', None)
            if attribute != 'bias' or weight is None or value != [len(weight)]:
                raise wrong
            module.bias = nn.Parameter(weight.new_zeros(len(weight)))
            return
        if not isinstance(value, list) or len(value) != old.ndim:
            raise wrong
        sizes = [m if n is None else n for n, m in zip(value, old.shape, strict=True)]
        if any(type(n) is not int or not 0 < n <= m for n, m in zip(sizes, old.shape, strict=True)):
            raise wrong
        resized = old.detach()[tuple(slice(n) for n in sizes)].clone()
        tensors[attribute] = nn.Parameter(resized, old.requires_grad) if isinstance(old, nn.Parameter) else resized
        return
    current: Any = module.__dict__.get(attribute)
    value = tuple(value) if isinstance(value, list) else value
    if (attribute[:1] == '_' or attribute in _SKIPPED or not _is_size(current) or not _is_size(value)
            or type(value) is not type(current)):
        raise wrong
    new, old = ((value,), (current,)) if isinstance(value, int) else (value, current)
    if len(new) != len(old) or any(not 0 < n <= m for n, m in zip(new, old, strict=True)):
        raise wrong
    setattr(module, attribute, value)


def _check_layer(module: nn.Module, name: str) -> None:
    """Raise a LeanError if a layer's weight is not of the size that its attributes say."""
    if isinstance(module, nn.Linear):
        expected = {'weight': (module.out_features, module.in_features), 'bias': (module.out_features,)}
    elif isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        inputs = module.in_channels // module.groups if module.in_channels % module.groups == 0 else 0
        expected = {'weight': (module.out_channels, inputs, *module.kernel_size), 'bias': (module.out_channels,)}
    elif isinstance(module, nn.modules.batchnorm._BatchNorm):
        expected = dict.fromkeys(('weight', 'bias', 'running_mean', 'running_var'), (module.num_features,))
    else:
        return
    for key, shape in expected.items():
        tensor = getattr(module, key)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise LeanError(f'The step {STEP!r} gives {name}.{key} the shape {list(tensor.shape)}, but the layer says '
                            f'{list(shape)}.')
