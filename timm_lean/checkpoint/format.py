"""One `.safetensors` file that rebuilds its network: tensors plus, in the header, the recipe.

The header's `timm_lean` entry is JSON: format version, architecture, model arguments, structural steps, and timm's
pretrained_cfg (input size, normalization, class names). Nothing is pickled and no code is stored; loading builds the
network from timm's registry and loads the tensors strictly.
"""
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import parse_model_name, save_for_hf
from timm.models._features import FeatureGetterNet
from timm.models._hub import filter_pretrained_cfg
from timm.utils import unwrap_model

from timm_lean.errors import CheckpointError, LeanError

from .allocate import allocate, skeleton
from .files import atomic_dir, atomic_file
from .int8 import Int8Report
from .limits import check_header_size, parse_entry
from .pretrained_cfg import clean_pretrained_cfg
from .recipe import LEAN_ENTRY, Recipe, build, has_step, lost_zeros, note_zeros, recipe_of, zero_kernels
from .stored import Stored, store

__all__ = [
    'load_any', 'load_model', 'read_header', 'read_recipe', 'save_hf_dir', 'save_model', 'set_head',
    'warn_of_lost_zeros']

FORMAT_VERSION = 1
INT8_VERSION = 2  # of files with int8 weights, which versions before them cannot read
_logger = logging.getLogger(__name__)
MODEL_KEY = 'timm_lean'
PRUNED_STEP = 'prune_kernels'
_LOST = 0.01  # share of a model's zeros: those of a new classifier
# Arguments of timm.create_model that download, open other files or choose a device.
RUNTIME_ARGS = {
    'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir', 'features_only', 'device',
    'dtype', 'scriptable', 'exportable', 'no_jit'}


def save_model(
        model: nn.Module, path: str | Path, packed: bool = True, *, weights: str = 'float',
) -> Int8Report | None:
    """Write a model to one self-describing `.safetensors` file, atomically.

    Args:
        model: A model made by `timm.create_model` (any timm model), possibly restructured by this package, or a wrapper
            of one: compiled, DDP, EMA (then the averaged weights are meant).
        path: The file to write.
        packed: Of convolutions store the kernels that pruning left only, if kernels were pruned and the file gets
            smaller. Readers other than `load_model` need plain tensors: save with False, or by `save_hf_dir`.
        weights: 'float', as they are, or 'int8' with a float scale for each filter: a quarter of the size, rounded.
            `load_model` gives floats in any case.

    Returns:
        For int8 the error of each weight, else None.

    Raises:
        CheckpointError: The model cannot be rebuilt from its name and arguments, so the file would not load.
        LeanError: Weights that are not finite as int8, or another name for `weights`.
        OutputError: The disk is full.
    """
    model = unwrap_model(model)
    try:
        recipe = recipe_of(model)
    except LeanError as e:
        raise CheckpointError(str(e)) from e
    tensors = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    skeleton(recipe, {k: tuple(v.shape) for k, v in tensors.items()}, 'The model to be saved')
    warn_of_lost_zeros(model, recipe.steps)
    cfg = filter_pretrained_cfg(
        {k: v for k, v in model.pretrained_cfg.items() if k != 'state_dict'},  # type: ignore[union-attr, operator]
        remove_source=True, remove_null=True)
    cfg = dict(sorted(clean_pretrained_cfg(cfg).items()))
    tensors, storage, report = store(tensors, weights, packed and has_step(model, PRUNED_STEP))
    header = {
        'format': INT8_VERSION if 'int8' in storage else FORMAT_VERSION,
        'architecture': recipe.architecture,
        'model_args': recipe.model_args,
        'steps': recipe.steps,
        'pretrained_cfg': {**cfg, 'num_classes': getattr(model, 'num_classes', None)},
        **storage,
    }
    with atomic_file(path) as temporary:
        # one entry only: safetensors writes several in an order that changes from run to run
        save_file(tensors, temporary, metadata={MODEL_KEY: json.dumps(header)})
    return report


def warn_of_lost_zeros(model: nn.Module, steps: list[dict[str, Any]]) -> None:
    """Say that training has revived pruned kernels; folding and sharing fill them in on purpose.

    Args:
        model: The model, or a detector around it.
        steps: The structural steps taken on it.
    """
    names = [step['op'] for step in steps]
    if PRUNED_STEP not in names or {'fold', 'share'} & set(names[names.index(PRUNED_STEP):]):
        return
    lost = lost_zeros(model)
    if lost is None:  # how many there were is not known
        lost = 0. if zero_kernels(model) else 1.
    if lost > _LOST:
        _logger.warning(f'{100 * lost:.0f} % of the kernels that were pruned in this model are not zero any more: '
                        'training revived them. Keep them by timm_lean.keep_zeros(model, optimizer), or by '
                        'KernelPruningHook().')


def load_model(
        path: str | Path,
        num_classes: int | None = None,
        *,
        features_only: bool = False,
        out_indices: Sequence[int] | None = None,
) -> nn.Module:
    """Load a file written by `save_model` into a newly built network.

    Args:
        path: The file.
        num_classes: Give the model a newly initialized classifier for this many classes.
        features_only: Return a network that maps images to a list of feature maps, as timm's `features_only` does.
        out_indices: Its levels, 0 the first; all of them if None.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        CheckpointError: The file is missing, damaged, foreign, or does not hold the network it describes.
        LeanError: The network has no such feature levels.
    """
    header = read_header(path)
    recipe = _recipe(header)
    try:
        with safe_open(path, framework='pt') as f:
            stored = Stored(f, header)
            model = allocate(recipe, stored.shapes, str(path))
            model.load_state_dict(stored.tensors())
        if has_step(model, PRUNED_STEP):
            note_zeros(model)
        cfg = clean_pretrained_cfg(header['pretrained_cfg'])
        _set_pretrained_cfg(model, {**cfg, 'architecture': recipe.architecture})
    except LeanError as e:
        raise e if str(path) in str(e) else CheckpointError(f'{path} cannot be loaded: {e}') from e
    except (SafetensorError, OSError, RuntimeError) as e:
        raise CheckpointError(f'{path} cannot be loaded: {_one_line(e)}') from e
    if num_classes is not None:
        set_head(model, num_classes)
    return _features(model, out_indices).eval() if features_only else model.eval()


def load_any(source: str, *, pretrained: bool = False, num_classes: int | None = None, **kwargs: Any) -> nn.Module:
    """Create a model from a timm name, a checkpoint file, or `local-dir:DIR` with its weights.

    Args:
        source: What to load.
        pretrained: Give a timm name timm's weights (a download, unless they are in the cache) instead of random ones.
        num_classes: Number of classes; a checkpoint's classifier is replaced if it has another number.
        **kwargs: Model arguments for a timm name.

    Returns:
        The model, in eval mode, on the CPU.

    Raises:
        LeanError: There is no such model, or it cannot be loaded.
    """
    path = Path(source)
    if path.suffix == '.safetensors' or _is_file(path):
        if kwargs:
            raise LeanError(f'Model arguments {kwargs} cannot be given for the checkpoint {source}: '
                            'its structure is fixed.')
        return load_model(path, num_classes=num_classes)
    try:
        kind, name = parse_model_name(source)
    except ValueError as e:
        raise LeanError(str(e)) from e
    if kind == 'hf-hub':
        raise LeanError(f'{source}: models are not downloaded. Give a timm name, a file or local-dir:DIR.')
    if kind == 'local-dir':
        try:
            model = timm.create_model(source, pretrained=True, **kwargs)
        except Exception as e:  # timm reads configs and weights here without checks of its own
            raise CheckpointError(f'{source} cannot be loaded: {type(e).__name__}: {e}') from e
        if num_classes is not None:
            set_head(model, num_classes)
        return model.eval()
    if not timm.is_model(name.split('.')[0]):
        near = ', '.join(timm.list_models(f'*{name.split("_")[0]}*')[:5])
        raise LeanError(f'Unknown model {source!r}: not a timm name and not a file.'
                        + (f' Did you mean one of {near} ...?' if near else '') + ' See `timm-lean models`.')
    if num_classes is not None:
        kwargs['num_classes'] = num_classes
    return _timm_pretrained(name, kwargs) if pretrained else build(Recipe(name, kwargs)).eval()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # longer than names of files can be; or with a null character
        return False


def _timm_pretrained(name: str, kwargs: dict[str, Any]) -> nn.Module:
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=False) if timm.is_model_pretrained(name) else None
    if cfg is None or not cfg.has_weights:
        raise LeanError(f'timm has no trained weights for {name!r}. Give a checkpoint file.')
    with torch.device('meta'):
        build(Recipe(name, kwargs))  # so that arguments that do not fit are not blamed on the download
    try:
        return timm.create_model(name, pretrained=True, **kwargs).eval()
    except Exception as e:  # of many kinds, from the hub's client
        raise LeanError(f"timm's weights for {name!r} cannot be had ({type(e).__name__}); without a network they must "
                        'be in the cache. Give a checkpoint file instead.') from e


def set_head(model: nn.Module, num_classes: int) -> None:
    """Replace the classifier by a new one for `num_classes` classes, unless it already has that many."""
    if getattr(model, 'num_classes', None) != num_classes:
        model.reset_classifier(num_classes)  # type: ignore[operator]
        _set_pretrained_cfg(model, dict(num_classes=num_classes, label_names=None, label_descriptions=None))


def save_hf_dir(model: nn.Module, directory: str | Path) -> None:
    """Write `config.json` and `model.safetensors`, which `timm.create_model('local-dir:DIR', pretrained=True)` loads.

    Restructured models are written under the name `lean`, so their users need `import timm_lean` first; so do users of
    this package's own names. Tensors are always plain.
    """
    model = unwrap_model(model)
    recipe = recipe_of(model)
    name, args = recipe.create_args()
    extra = {k: v for k, v in args.items() if k in ('base', 'recipe')}
    cfg = {'architecture': name}
    with atomic_dir(directory) as temporary:
        save_for_hf(
            model, str(temporary), model_config={'pretrained_cfg': cfg}, model_args=extra, safe_serialization=True)


def read_header(path: str | Path) -> dict[str, Any]:
    """The `timm_lean` entry of a checkpoint, checked.

    Raises:
        CheckpointError: The file is missing, damaged, or was not written by `save_model`.
    """
    path = Path(path)
    if not _is_file(path):
        raise CheckpointError(f'{path} is not a file.')
    try:
        check_header_size(path)
        with safe_open(path, framework='pt') as f:
            metadata = f.metadata() or {}
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as e:
        raise CheckpointError(f'{path} is not a whole safetensors file: {e}') from e
    if MODEL_KEY not in metadata:
        raise CheckpointError(
            f'{path} is a safetensors file without a timm-lean header, so its architecture is not known. Load it by '
            f'timm.create_model(NAME, checkpoint_path={str(path)!r}), then save it by timm_lean.save_model.')
    header = parse_entry(metadata[MODEL_KEY], f'{path}: the timm-lean header')
    expected = {'architecture': str, 'model_args': dict, 'steps': list, 'pretrained_cfg': dict}
    if not isinstance(header, dict) or header.get('format') not in (FORMAT_VERSION, INT8_VERSION):
        version = repr(header.get('format') if isinstance(header, dict) else header)[:100]
        raise CheckpointError(f'{path} has timm-lean format {version}; this version reads {FORMAT_VERSION} and '
                              f'{INT8_VERSION}. Update timm-lean if the file is newer.')
    for key, kind in expected.items():
        if not isinstance(header.get(key), kind):
            raise CheckpointError(f'{path} has a damaged timm-lean header: {key!r} should be a {kind.__name__}, '
                                  f'got {str(header.get(key))[:100]!r}.')
    if runtime := sorted(RUNTIME_ARGS & header['model_args'].keys()):
        raise CheckpointError(f'{path} has a damaged timm-lean header: {", ".join(runtime)} do not describe a network.')
    if header['architecture'] == LEAN_ENTRY or any(k in header['model_args'] for k in ('base', 'recipe')):
        raise CheckpointError(f'{path} has a damaged timm-lean header: steps belong in "steps".')
    return header


def read_recipe(path: str | Path) -> Recipe:
    """What network a checkpoint holds, from its header alone; see `read_header`."""
    return _recipe(read_header(path))


def _recipe(header: dict[str, Any]) -> Recipe:
    return Recipe(header['architecture'], header['model_args'], header['steps'])


def _features(model: nn.Module, out_indices: Sequence[int] | None) -> nn.Module:
    if not hasattr(model, 'feature_info') or not hasattr(model, 'forward_intermediates'):
        raise LeanError(f'{type(model).__name__} has no feature levels in timm: features_only is not possible.')
    levels = len(getattr(model.feature_info, 'info', model.feature_info))  # type: ignore[arg-type]
    indices = tuple(range(levels)) if out_indices is None else tuple(out_indices)
    if not indices or any(type(i) is not int or not 0 <= i < levels for i in indices):
        raise LeanError(f'out_indices={out_indices!r} is not possible: {type(model).__name__} has the feature levels 0 '
                        f'to {levels - 1}.')
    return FeatureGetterNet(model, out_indices=indices)


def _one_line(error: Exception) -> str:
    return ' '.join(str(error).split())[:500]


def _set_pretrained_cfg(model: nn.Module, cfg: dict[str, Any]) -> None:
    num_classes = getattr(model, 'num_classes', None)
    if len(cfg.get('label_names') or ()) != num_classes:  # of another head
        cfg = {**cfg, 'label_names': None, 'label_descriptions': None}
    cfg = {**model.pretrained_cfg, **cfg, 'num_classes': num_classes}  # type: ignore[dict-item]
    model.pretrained_cfg = model.default_cfg = cfg  # type: ignore[assignment]
