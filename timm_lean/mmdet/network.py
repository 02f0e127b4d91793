"""Any timm network as a feature extractor with checked weights: from a name, a folder or a checkpoint file.

timm's `features_only` wrappers drop the head and rename some modules, and load weights without complaint about what
does not fit. Here weights are matched one by one: every tensor of the extractor must be in the file with its shape,
and what the extractor does not have must belong to the rest of the same network.
"""
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn as nn

from timm_lean.checkpoint.format import load_any
from timm_lean.checkpoint.limits import check_numbers, check_steps, limited
from timm_lean.checkpoint.recipe import Recipe, build, recipe_of
from timm_lean.errors import CheckpointError, LeanError
from timm_lean.sharing import ShareReport
from timm_lean.sharing import share as share_bases

from .arguments import check_arguments
from .weights import Weights, read_weights

__all__ = [
    'build_features', 'copy_weights', 'feature_channels', 'feature_levels', 'flat_name', 'load_features', 'whole_names',
]

_LOCAL_DIR = 'local-dir:'
_MIN_REDUCTION = 4  # detectors start at stride 4


def build_features(
        model_name: str = '',
        pretrained: bool = False,
        checkpoint: str | None = None,
        out_indices: Sequence[int] | None = None,
        model_args: dict[str, Any] | None = None,
        share: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, Recipe, ShareReport | None]:
    """Build a feature extractor, see `TimmBackbone` for the arguments.

    Returns:
        The network, images `[B, C, H, W]` to a list of feature maps, the recipe of the network it comes from, and what
        `share` did.

    Raises:
        LeanError: The name, the levels, the file or the conversion are not possible; the message says why.
    """
    recipe, weights = _source(model_name, pretrained, checkpoint, dict(model_args or {}))
    full = _on_meta(recipe, weights)
    indices = _check_indices(full, out_indices, recipe.architecture)
    net = _create(recipe, indices, pretrained and weights is None)
    if weights is not None:
        load_features(net, weights, recipe.architecture, list(full.state_dict()))
    if share is None:
        return net, recipe, None
    _check_share(share, recipe, trained=pretrained or weights is not None)
    converted = _share(net, recipe, share)
    recipe = Recipe(recipe.architecture, recipe.model_args, list(converted.lean_steps))
    net = _create(recipe, indices, False)
    copy_weights(converted, net)
    return net, recipe, converted.lean_report


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Between a whole network and its feature extractor; what only one of them has (the head) stays as it is.

    Raises:
        CheckpointError: They are not of the same network.
    """
    given = {flat_name(source, key): value for key, value in source.state_dict().items()}
    given |= {key.replace('.', '_'): value for key, value in source.state_dict().items()}
    found = 0
    for key, value in target.state_dict().items():
        other = given.get(flat_name(target, key), given.get(key.replace('.', '_')))
        if other is not None:
            value.copy_(other)
            found += 1
    if found < min(len(source.state_dict()), len(target.state_dict())):
        raise CheckpointError('The names of the feature extractor and of its whole network do not match.')


def feature_channels(
        model_name: str = '',
        pretrained: bool = False,
        checkpoint: str | None = None,
        out_indices: Sequence[int] | None = None,
        model_args: dict[str, Any] | None = None,
) -> list[int]:
    """Channels of the feature maps `build_features` would give, without allocating or loading the network."""
    recipe, weights = _source(model_name, pretrained, checkpoint, dict(model_args or {}), header_only=True)
    indices = _check_indices(_on_meta(recipe, weights), out_indices, recipe.architecture)
    try:
        with torch.device('meta'):
            net = _create(recipe, indices, False)
    except LeanError:
        net = _create(recipe, indices, False)
    return list(net.feature_info.channels())  # type: ignore[union-attr, operator]


def feature_levels(net: nn.Module) -> list[dict[str, Any]]:
    """timm's description of all feature levels of a network: `num_chs`, `reduction` and `module` of each."""
    info = net.feature_info
    return list(getattr(info, 'info', info))  # type: ignore[arg-type]


def load_features(net: nn.Module, weights: Weights, architecture: str, known: Sequence[str] = ()) -> None:
    """Load the weights of a whole network (or of another such extractor) into a feature extractor, strictly.

    Args:
        net: What `build_features` builds.
        weights: Tensors by name.
        architecture: Name for the error message.
        known: Names in the whole network, those of its head included; none are accepted beyond the extractor's if
            empty.

    Raises:
        CheckpointError: Tensors are missing, have another shape or belong to another network.
    """
    state = net.state_dict()
    target = {flat_name(net, key): key for key in state}
    given = {flat_name(net, key): key for key in weights.tensors}
    head = {key.replace('.', '_') for key in known}
    missing = [key for flat, key in target.items() if flat not in given and not flat.endswith('num_batches_tracked')]
    unexpected = [key for flat, key in given.items() if flat not in target and flat not in head]
    wrong = [
        f'{key} {list(weights.tensors[key].shape)} instead of {list(state[target[flat]].shape)}'
        for flat, key in given.items() if flat in target and weights.tensors[key].shape != state[target[flat]].shape]
    found = '; '.join(
        f'{label} {", ".join(keys[:3])}' + (f' and {len(keys) - 3} more' if len(keys) > 3 else '')
        for label, keys in (('missing', missing), ('other shape', wrong), ('unexpected', unexpected)) if keys)
    if found:
        raise CheckpointError(
            f'{weights.source} does not fit {architecture!r}: {found}. Give the model_name and model_args it was made '
            'with, or another checkpoint.')
    net.load_state_dict(
        {key: weights.tensors[given[flat]] for flat, key in target.items() if flat in given}, strict=False)


def whole_names(recipe: Recipe) -> list[str]:
    """Names of all tensors of the network a recipe describes, its head's included."""
    return list(_on_meta(recipe).state_dict())


def flat_name(net: nn.Module, name: str) -> str:
    """A module or tensor name without the prefix and the underscores that timm's feature wrappers put into it."""
    children = [child for child, _ in net.named_children()]
    if len(children) == 1:
        name = name.removeprefix(f'{children[0]}.')
    return name.replace('.', '_')


def _source(
        model_name: str, pretrained: bool, checkpoint: str | None, args: dict[str, Any], header_only: bool = False,
) -> tuple[Recipe, Weights | None]:
    """What to build, and the weights if they come from a file."""
    if checkpoint is not None:
        if pretrained:
            raise LeanError(f'TimmBackbone got pretrained=True and checkpoint={checkpoint!r}; give one of them.')
        weights = read_weights(checkpoint, header_only=header_only)
        if weights.recipe is None:
            if not model_name:
                raise LeanError(f'{checkpoint} does not say which network it holds. Give model_name as well.')
            return Recipe.from_create_args(model_name, args), weights
        recipe, given = weights.recipe, Recipe.from_create_args(model_name, args)
        if model_name and given.architecture.split('.')[0] != recipe.architecture.split('.')[0]:
            raise CheckpointError(
                f'{checkpoint} holds a {recipe.architecture!r}, but model_name is {model_name!r}. Leave model_name '
                'out, or give another checkpoint.')
        return Recipe(recipe.architecture, {**recipe.model_args, **given.model_args}, recipe.steps), weights
    if not isinstance(model_name, str) or not model_name:
        raise LeanError("TimmBackbone needs model_name='...' (see timm.list_models() and `timm-lean models`) or "
                        'checkpoint=FILE.')
    if model_name.startswith(_LOCAL_DIR):
        model = load_any(model_name, **args)
        recipe = recipe_of(model)
        return recipe, Weights(model_name, dict(model.state_dict()), recipe)
    return Recipe.from_create_args(model_name, args), None


def _on_meta(recipe: Recipe, weights: Weights | None = None) -> nn.Module:
    """The whole network without memory for its tensors (with it, if its constructor needs values).

    A file's recipe may take no more work than the file's tensors justify.
    """
    if weights is not None and weights.recipe is not None and weights.shapes:
        try:
            check_steps(recipe.steps)
            check_numbers(recipe.model_args, weights.shapes)
            with limited(
                    weights.shapes, recipe.architecture, steps=bool(recipe.steps)), torch.device('meta'):
                return build(recipe)
        except LeanError as e:
            raise CheckpointError(f'{weights.source} cannot be rebuilt: {e}') from e
    try:
        with torch.device('meta'):
            return build(recipe)
    except LeanError:
        return build(recipe)


def _create(recipe: Recipe, out_indices: tuple[int, ...], pretrained: bool) -> nn.Module:
    name, args = recipe.create_args()
    try:
        return timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=out_indices, **args)
    except LeanError:
        raise
    except Exception as e:  # timm's wrappers assert or fail in their own ways on networks they cannot take apart
        raise LeanError(f'timm cannot make a feature extractor of {recipe.architecture!r}: '
                        f'{type(e).__name__}: {e}') from e


def _check_share(share: Any, recipe: Recipe, trained: bool) -> None:
    if not isinstance(share, Mapping):
        raise LeanError('share must be a dict of the options of timm_lean.share, like dict(params=0.5), '
                        f'got {share!r}.')
    check_arguments(share_bases, share, f'share={dict(share)!r} of TimmBackbone')
    if any(step['op'] == 'share' for step in recipe.steps):
        raise LeanError(f'share={dict(share)!r}: the checkpoint holds a network whose filters are shared already. '
                        'Take share out of the config (share=None).')
    chosen = [key for key in ('params', 'energy') if share.get(key) is not None]
    if chosen and not trained:
        raise LeanError(f'share={dict(share)!r} chooses the ranks by the weights, and this network has only random '
                        f'ones. Give pretrained=True or checkpoint=FILE, or shared_rank instead of {chosen[0]}.')


def _share(net: nn.Module, recipe: Recipe, options: Mapping[str, Any]) -> Any:
    """The whole network of a feature extractor, without its classifier, converted to shared bases."""
    full: Any = build(recipe)
    full.reset_classifier(0)
    copy_weights(net, full)
    return share_bases(full, **options)


def _check_indices(full: nn.Module, out_indices: Sequence[int] | None, architecture: str) -> tuple[int, ...]:
    if not hasattr(full, 'feature_info'):
        raise LeanError(f'{architecture!r} has no feature levels in timm and cannot be a backbone.')
    levels = feature_levels(full)
    if out_indices is None:
        return tuple(i for i, level in enumerate(levels) if level['reduction'] >= _MIN_REDUCTION)
    described = ', '.join(f'{i}: stride {level["reduction"]}, {level["num_chs"]} channels'
                          for i, level in enumerate(levels))
    if isinstance(out_indices, int) or not all(
            isinstance(i, int) and 0 <= i < len(levels) for i in out_indices) or not out_indices:
        raise LeanError(f'out_indices={out_indices!r} is not possible: {architecture!r} has the feature levels 0 to '
                        f'{len(levels) - 1} ({described}).')
    if sorted(set(out_indices)) != list(out_indices):
        raise LeanError(f'out_indices={tuple(out_indices)} must increase without repeats.')
    return tuple(out_indices)
