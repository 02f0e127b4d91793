"""Channel pruning of a trained detector's backbone; the neck's input channels are cut with it.

The backbone is pruned as the whole timm network it comes from (`timm_lean.pruning.prune_channels`), so that its recipe
says the new sizes. Which channels stay is read off the batch norms: while pruning, their running means hold channel
numbers.

Limits: a feature level must end in a batch norm of its own channels (ResNet, MobileNet, RegNet kinds; not DenseNet).
"""
import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from timm_lean.errors import CheckpointError, LeanError
from timm_lean.pruning import prune_channels
from timm_lean.recipe import LEAN_ENTRY, Recipe, build

from .backbone import TimmBackbone
from .channels import AUTO
from .detector import build_detector, describe, load_detector, save_detector
from .network import feature_levels, flat_name

__all__ = ['prune_detector']


def prune_detector(
        source: str | Path, output: str | Path, criterion: str = 'spectral_norm', ratio: float = 0.5, *,
        again: bool = False, image_size: int = 128, **kwargs: Any,
) -> nn.Module:
    """Remove channels of a detector's backbone and write the detector to a `.safetensors` file.

    Args:
        source: A file of `SafetensorsHook` or a folder of `export_detector`.
        output: The new file, for `load_detector`, `TimmBackbone(checkpoint=...)` and `load_from`.
        criterion: See `prune_channels`.
        ratio: See `prune_channels`.
        again: Prune a backbone that has been pruned by channels before.
        image_size: Side of the images it is traced with; no effect on the result.
        kwargs: More of `prune_channels`.

    Returns:
        The pruned detector, with the `channel_report` of its backbone.

    Raises:
        LeanError: Not a detector of this package, one with another backbone, or a network that cannot be pruned so.
    """
    old: Any = load_detector(source)
    if not isinstance(old.backbone, TimmBackbone):
        raise LeanError(
            f'{source}: the backbone is a {type(old.backbone).__name__}, only a TimmBackbone can be pruned.')
    recipe = _recipe(old.backbone)
    if any(step['op'] == 'resize' for step in recipe.steps) and not again:
        raise LeanError(f'{source} has been pruned by channels before. If pruning it again is meant, say --again.')
    full = build(recipe).eval()
    _copy_weights(old.backbone.net, full)
    means = {name: m.running_mean.clone() for name, m in _norms(full)}
    for _, norm in _norms(full):
        norm.running_mean.copy_(torch.arange(len(norm.running_mean)))
    pruned = prune_channels(full, torch.zeros(1, 3, image_size, image_size), criterion, ratio, **kwargs)
    kept = {name: m.running_mean.round().long() for name, m in _norms(pruned)}
    for name, norm in _norms(pruned):
        norm.running_mean = means[name][kept[name]]

    cfg = copy.deepcopy(old.cfg)
    steps: list[dict[str, Any]] = list(pruned.lean_steps)  # type: ignore[arg-type]
    name, args = Recipe(recipe.architecture, recipe.model_args, steps).create_args()
    cfg.model.backbone.update(model_name=name, model_args=args)
    neck = cfg.model.get('neck')
    for part in neck[:1] if isinstance(neck, list) else [neck] if neck else []:
        part['in_channels'] = AUTO
    new: Any = build_detector(cfg)
    _copy_weights(pruned, new.backbone.net)
    levels = [_kept_of_level(pruned, kept, level, str(source)) for level in old.backbone.out_indices]
    state, tensors = old.state_dict(), {}
    for key, value in new.state_dict().items():
        if key.startswith('backbone.'):
            tensors[key] = value
        elif key not in state:
            raise LeanError(f'{source}: {key} appears only after pruning; this detector cannot be pruned.')
        else:
            tensors[key] = _cut(state[key], value, key, old.backbone.out_channels, levels)
    new.load_state_dict(tensors)
    new.cfg, new.dataset_meta = cfg, old.dataset_meta
    save_detector(new, output, describe(cfg, new, old.dataset_meta))
    new.channel_report = pruned.channel_report
    return new.eval()


def _recipe(backbone: TimmBackbone) -> Recipe:
    recipe, steps = backbone.recipe, list(backbone.steps)
    if recipe.architecture != LEAN_ENTRY:
        return Recipe(recipe.architecture, recipe.model_args, steps)
    args = {k: v for k, v in recipe.model_args.items() if k not in ('base', 'recipe')}
    return Recipe(recipe.model_args['base'], args, [*recipe.model_args['recipe'], *steps])


def _norms(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]


def _flat(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key.replace('.', '_'): value for key, value in model.state_dict().items()}


def _copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Between a whole network and its feature extractor; what only one of them has (the head) stays as it is."""
    given = {flat_name(source, key): value for key, value in source.state_dict().items()} | _flat(source)
    found = 0
    for key, value in target.state_dict().items():
        other = given.get(flat_name(target, key), given.get(key.replace('.', '_')))
        if other is not None:
            value.copy_(other)
            found += 1
    if found < min(len(source.state_dict()), len(target.state_dict())):
        raise CheckpointError('The names of the backbone and of its whole network do not match; it cannot be pruned.')


def _kept_of_level(model: nn.Module, kept: dict[str, torch.Tensor], level: int, source: str) -> torch.Tensor:
    """The channels that stay of a feature level: those of the last batch norm in the level's module."""
    entry = feature_levels(model)[level]
    found = [k for name, k in kept.items()
             if f'{name}.'.startswith(entry['module'] + '.') and len(k) == entry['num_chs']]
    if not found:
        raise LeanError(f'{source}: feature level {level} ({entry["module"]}) does not end in a batch norm; channel '
                        'pruning of such a backbone is not supported.')
    return found[-1]


def _cut(old: torch.Tensor, new: torch.Tensor, key: str, channels: list[int], kept: list[torch.Tensor]) -> torch.Tensor:
    if old.shape == new.shape:
        return old
    fits = [k for n, k in zip(channels, kept, strict=True)
            if old.ndim > 1 and (n, len(k)) == (old.shape[1], new.shape[1])]
    if not fits or any(not torch.equal(fits[0], k) for k in fits) or old[:, fits[0]].shape != new.shape:
        raise LeanError(f'{key} {list(old.shape)} cannot be cut to {list(new.shape)}: its input is no '
                        'single level of the backbone.')
    return old[:, fits[0]]
