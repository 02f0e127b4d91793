"""Weights from files, for backbones and whole detectors; `.safetensors` for all of MMEngine's loading.

Importing this file registers a loader with MMEngine, so that `load_from=`, `resume`'s checkpoints aside, `init_cfg`,
`init_detector` and `load_checkpoint` take `.safetensors` files.
"""
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.runner.checkpoint import CheckpointLoader
from safetensors import SafetensorError, safe_open

from timm_lean.checkpoint.format import INT8_VERSION, MODEL_KEY, read_header, read_recipe
from timm_lean.checkpoint.limits import check_header_size, parse_entry
from timm_lean.checkpoint.recipe import Recipe
from timm_lean.checkpoint.stored import Stored
from timm_lean.errors import CheckpointError

from .settings import parse_config
from .structure import steps_of
from .trust import check_recipe

__all__ = [
    'DETECTOR_KEY', 'Weights', 'detector_header', 'format_version', 'load_checkpoint', 'load_from_safetensors',
    'read_weights', 'tensor_shapes',
]

DETECTOR_KEY = 'timm_lean_detector'
FORMATS = (1, INT8_VERSION)  # the second with structural steps on the whole detector, or weights in int8
_PREFIXES = ('backbone.net.', 'net.', 'backbone.')  # a detector, its backbone, a detector of MMDetection's own


@dataclass
class Weights:
    """Tensors of a network.

    Attributes:
        source: Where they come from, for messages.
        tensors: By name.
        recipe: The network, where the file says it.
        shapes: Of all tensors of the file, read or not.
    """
    source: str
    tensors: dict[str, torch.Tensor]
    recipe: Recipe | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


def read_weights(path: str, prefix: str | None = None, *, header_only: bool = False) -> Weights:
    """Read a backbone's weights from a classification or detector checkpoint.

    Args:
        path: `.safetensors`, or what else MMEngine's loaders take.
        prefix: Only the tensors under this prefix, which is taken off.
        header_only: Read the recipe and no tensors.

    Raises:
        CheckpointError: The file is missing, damaged or not a checkpoint.
    """
    recipe, shapes = None, dict[str, tuple[int, ...]]()
    if str(path).endswith('.safetensors'):
        metadata, shapes, tensors = _read(path, tensors=not header_only)
        if DETECTOR_KEY in metadata:
            header = detector_header(path)
            _check_backbone_alone(header, str(path))
            backbone = header.get('backbone')
            recipe = Recipe(**backbone) if backbone else None
        elif MODEL_KEY in metadata:
            recipe = read_recipe(path)
    elif header_only:  # other formats have no recipe
        tensors = {}
    else:
        checkpoint = load_checkpoint(path)
        tensors = checkpoint.get('state_dict', checkpoint.get('model', checkpoint))
        if not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            raise CheckpointError(f'{path} holds no state dict.')
    if prefix is not None:
        prefix = prefix.rstrip('.') + '.'
        tensors = {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}
        if not tensors:
            raise CheckpointError(f'{path} has no tensors under {prefix!r}.')
    for start in _PREFIXES:
        if any(k.startswith(start) for k in tensors):
            tensors = {k[len(start):]: v for k, v in tensors.items() if k.startswith(start)}
    return Weights(str(path), dict(tensors), recipe, shapes)


@CheckpointLoader.register_scheme(prefixes=r'.+\.safetensors$', force=True)
def load_from_safetensors(filename: str, map_location: Any = None) -> dict[str, Any]:
    """MMEngine's loader for `.safetensors` files.

    Args:
        filename: The file.
        map_location: Device, as in `torch.load`.

    Returns:
        `state_dict`, and `meta` with the `dataset_meta` (class names) if the file has it.
    """
    metadata, _, tensors = _read(Path(filename).expanduser())
    device = map_location if isinstance(map_location, (str, torch.device)) else None
    if device is not None:
        tensors = {k: v.to(device) for k, v in tensors.items()}
    header = detector_header(filename) if DETECTOR_KEY in metadata else {}
    meta = {'dataset_meta': header['metainfo']} if header.get('metainfo') else {}
    return {'state_dict': tensors, 'meta': meta}


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """A checkpoint of a detector, `.safetensors` or `.pth`, as MMEngine's loaders give it, on the CPU.

    Raises:
        CheckpointError: It does not exist or cannot be read.
    """
    if str(path).endswith('.safetensors'):
        return load_from_safetensors(str(path), 'cpu')
    try:
        return CheckpointLoader.load_checkpoint(str(path), map_location='cpu', logger='silent')
    except FileNotFoundError as e:
        raise CheckpointError(f'The checkpoint {path} does not exist.') from e
    except Exception as e:  # pickle and zip errors of all kinds
        raise CheckpointError(f'The checkpoint {path} cannot be read: {str(e).splitlines()[0]}') from e


def detector_header(path: str | Path) -> dict[str, Any]:
    """The checked header of a detector written by this package.

    Raises:
        CheckpointError: The file is damaged or something else.
    """
    metadata = _metadata(path)
    if DETECTOR_KEY not in metadata:
        raise CheckpointError(f'{path} was not written by SafetensorsHook or export_detector: it does not say which '
                              'detector it holds.')
    header = parse_entry(metadata[DETECTOR_KEY], f'The header of {path}')
    if not isinstance(header, dict) or type(header.get('format')) is not int or header['format'] not in FORMATS:
        version = repr(header.get('format') if isinstance(header, dict) else header)[:100]
        raise CheckpointError(f'{path} has detector format {version}; this version reads '
                              f'{" and ".join(map(str, FORMATS))}. '
                              'Update timm-lean if the file is newer.')
    _check_entries(header, str(path))
    palette = header['metainfo'].get('palette')
    if isinstance(palette, list):  # JSON has no tuples, and MMDetection draws in colours that are tuples only
        header['metainfo']['palette'] = [tuple(colour) for colour in palette]
    return header


def format_version(cfg: Mapping[str, Any]) -> int:
    """The format of the file of a detector with this config: 1 where versions that know no steps can read it."""
    return FORMATS[bool(steps_of(cfg))]


def tensor_shapes(path: str | Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a detector's tensors, tied ones under all their names; none of them is read.

    Raises:
        CheckpointError: The file is damaged or something else.
    """
    return _read(path, tensors=False)[1]


def _check_backbone_alone(header: dict[str, Any], path: str) -> None:
    """Refuse the file of a detector whose backbone is not what its recipe says, but was changed with the whole."""
    for step in steps_of(parse_config(header['config'], path)):
        if step.get('op') != 'prune_kernels' and '"backbone.' in json.dumps(step):
            raise CheckpointError(
                f'{path} holds a detector that was changed as a whole ({step.get("op")}), its backbone cannot be taken '
                'out. Train the detector on by its own config with load_from=FILE, without model.backbone.checkpoint.')


def _check_entries(header: dict[str, Any], path: str) -> None:
    kinds = {'config': str, 'metainfo': dict, 'aliases': dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(header.get(key), kind)]
    backbone = header.get('backbone')
    if backbone is not None and not (
            isinstance(backbone, dict) and set(backbone) == {'architecture', 'model_args', 'steps'}
            and isinstance(backbone['steps'], list)):
        wrong.append('backbone')
    if not wrong:
        if not all(isinstance(name, str) for name in header['aliases'].values()):
            wrong.append('aliases')
        if not _is_metainfo(header['metainfo']):
            wrong.append('metainfo')
    if wrong:
        raise CheckpointError(f'{path} has a damaged header: {", ".join(wrong)}.')
    if backbone is not None:
        check_recipe(backbone['architecture'], backbone['model_args'], path)


def _is_metainfo(metainfo: dict[str, Any]) -> bool:
    """Whether these are class names and colours, each of which may be missing."""
    classes, palette = metainfo.get('classes', []), metainfo.get('palette', [])
    if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        return False
    if isinstance(palette, str):
        return palette in ('random', 'coco', 'voc', 'citys')
    return isinstance(palette, list) and all(
        isinstance(colour, list) and len(colour) == 3 and all(type(c) is int and 0 <= c <= 255 for c in colour)
        for colour in palette)


def _metadata(path: str | Path) -> dict[str, str]:
    if not Path(path).is_file():
        raise CheckpointError(f'The checkpoint {path} does not exist.')
    with _readable(path):
        check_header_size(path)
        with safe_open(path, framework='pt') as f:
            return f.metadata() or {}


def _read(
        path: str | Path, tensors: bool = True,
) -> tuple[dict[str, str], dict[str, tuple[int, ...]], dict[str, torch.Tensor]]:
    """Metadata, shapes and tensors of a safetensors file, packed ones as they were, tied ones under all their names."""
    metadata = _metadata(path)
    header: dict[str, Any] = {}
    if DETECTOR_KEY in metadata:
        header = detector_header(path)
    elif MODEL_KEY in metadata:
        header = read_header(path)
    aliases = header.get('aliases', {})
    with _readable(path), safe_open(path, framework='pt') as f:
        stored = Stored(f, header)
        shapes = stored.shapes
        state = stored.tensors() if tensors else {}
    for alias, name in aliases.items():
        if name not in shapes:
            raise CheckpointError(f'{path} has a damaged header: {alias} stands for {name}, which is missing.')
        shapes[alias] = shapes[name]
        if tensors:
            state[alias] = state[name]
    return metadata, shapes, state


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """What goes wrong while a file is read, as a CheckpointError that names it."""
    try:
        yield
    except CheckpointError as e:
        raise e if str(path) in str(e) else CheckpointError(f'{path} cannot be read: {e}') from e
    except (SafetensorError, OSError, ValueError, OverflowError, MemoryError) as e:
        raise CheckpointError(f'{path} is not a whole safetensors file: {e}') from e
