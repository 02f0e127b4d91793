"""Channel pruning of a trained detector's backbone; the neck's input channels are cut with it.

The backbone is pruned as the whole timm network it comes from (`timm_lean.pruning.prune_channels`), so that its recipe
says the new sizes; the report says which channels stay.

Limits: a feature level must end in a batch norm of its own channels (ResNet, MobileNet, RegNet kinds; not DenseNet).
"""
import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from timm_lean.checkpoint.recipe import Recipe, build, has_step
from timm_lean.errors import LeanError
from timm_lean.pruning import prune_channels

from .backbone import TimmBackbone
from .channels import AUTO
from .detector import build_detector, describe, load_detector, save_detector
from .network import copy_weights, feature_levels

__all__ = ['prune_detector']


def prune_detector(
        source: str | Path, output: str | Path, *, criterion: str = 'spectral_norm',
        pruning_ratio: float = 0.5, again: bool = False, image_size: int = 128,
        trust_imports: Sequence[str] = (), **kwargs: Any,
) -> nn.Module:
    """Remove channels of a detector's backbone and write the detector to a `.safetensors` file.

    Args:
        source: A file of `SafetensorsHook` or a folder of `export_detector`.
        output: The new file, for `load_detector`, `TimmBackbone(checkpoint=...)` and `load_from`.
        criterion: See `prune_channels`.
        pruning_ratio: See `prune_channels`.
        again: Prune a backbone that has been pruned by channels before.
        image_size: Side of the images it is traced with; no effect on the result.
        trust_imports: See `load_detector`.
        kwargs: More of `prune_channels`.

    Returns:
        The pruned detector, with the report of its backbone as `.lean_report`.

    Raises:
        LeanError: Not a detector of this package, one with another backbone, or a network that cannot be pruned so.
    """
    old: Any = load_detector(source, trust_imports=trust_imports)
    if not isinstance(old.backbone, TimmBackbone):
        raise LeanError(
            f'{source}: the backbone is a {type(old.backbone).__name__}, only a TimmBackbone can be pruned.')
    if not getattr(old, 'with_neck', False):
        raise LeanError(f'{source}: the detector has no neck between backbone and heads; it cannot be pruned.')
    recipe = old.backbone.recipe
    if has_step(old.backbone, 'resize') and not again:
        raise LeanError(f'{source} has been pruned by channels before. If pruning it again is meant, say --again.')
    full = build(recipe).eval()
    copy_weights(old.backbone.net, full)
    pruned: Any = prune_channels(full, torch.zeros(1, 3, image_size, image_size), criterion=criterion,
                                 pruning_ratio=pruning_ratio, **kwargs)

    cfg = copy.deepcopy(old.cfg)
    name, args = Recipe(recipe.architecture, recipe.model_args, pruned.lean_steps).create_args()
    cfg.model.backbone.update(model_name=name, model_args=args)
    neck = cfg.model.get('neck')
    for part in neck[:1] if isinstance(neck, list) else [neck] if neck else []:
        part['in_channels'] = AUTO
    new: Any = build_detector(cfg)
    copy_weights(pruned, new.backbone.net)
    levels = [_kept_of_level(pruned, level, str(source)) for level in old.backbone.out_indices]
    readers = _readers(old, image_size)
    state, tensors = old.state_dict(), {}
    for key, value in new.state_dict().items():
        if key.startswith('backbone.'):
            tensors[key] = value
        elif key not in state:
            raise LeanError(f'{source}: {key} appears only after pruning; this detector cannot be pruned.')
        else:
            reader = key.rpartition('.')[0]
            cut = state[key]
            if reader in readers and cut.ndim > 1:
                cut = cut[:, levels[readers[reader]]]
            if cut.shape != value.shape:
                raise LeanError(f'{source}: {key} {list(state[key].shape)} cannot be cut to {list(value.shape)}; this '
                                'detector cannot be pruned.')
            tensors[key] = cut
    new.load_state_dict(tensors)
    new.cfg, new.dataset_meta = cfg, old.dataset_meta
    save_detector(new, output, describe(cfg, new, old.dataset_meta))
    new.lean_report = pruned.lean_report
    return new.eval()


def _kept_of_level(pruned: Any, level: int, source: str) -> Any:
    """The channels that stay of a feature level: those of the last batch norm in the level's module."""
    entry = feature_levels(pruned)[level]
    found = [name for name, m in pruned.named_modules()
             if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.num_features == entry['num_chs']
             and f'{name}.'.startswith(entry['module'] + '.')]
    if not found:
        raise LeanError(f'{source}: feature level {level} ({entry["module"]}) does not end in a batch norm; channel '
                        'pruning of such a backbone is not supported.')
    return pruned.lean_report.kept.get(found[-1], slice(None))


@torch.no_grad()
def _readers(detector: Any, image_size: int) -> dict[str, int]:
    """Which of the backbone's outputs each module of the neck reads, by module name."""
    features: tuple[torch.Tensor, ...] = ()
    readers: dict[str, int] = {}

    def keep(module: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
        nonlocal features
        features = output

    def look(module: nn.Module, args: Any, name: str) -> None:
        for level, feature in enumerate(features):
            if args and args[0] is feature:
                readers[name] = level

    handles = [detector.backbone.register_forward_hook(keep)]
    handles += [module.register_forward_pre_hook(partial(look, name=f'neck.{name}'))
                for name, module in detector.neck.named_modules()]
    try:
        detector.extract_feat(torch.zeros(1, 3, image_size, image_size))
    finally:
        for handle in handles:
            handle.remove()
    return readers
