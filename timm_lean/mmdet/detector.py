"""A detector as safetensors plus config: save, export, load. No pickle, and loading runs no code (see `trust.py`).

What has been done to its structure is in the config (`structure.py`), so that whatever builds the config builds it.
"""
import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import get_state_dict
from mmengine.utils import import_modules_from_strings
from safetensors.torch import save_file

from timm_lean.checkpoint.files import atomic_dir, atomic_file
from timm_lean.checkpoint.format import INT8_VERSION, PRUNED_STEP, warn_of_lost_zeros
from timm_lean.checkpoint.int8 import Int8Report
from timm_lean.checkpoint.recipe import has_step, note_zeros
from timm_lean.checkpoint.stored import store
from timm_lean.errors import CheckpointError, LeanError

from .adopt import adopt_structure
from .backbone import TimmBackbone
from .channels import resolve_channels
from .settings import dump_config, open_config, parse_config
from .skeleton import check_work, misfit, tied_names
from .structure import set_steps
from .trust import check_config, registered_only
from .weights import DETECTOR_KEY, detector_header, format_version, load_checkpoint, tensor_shapes

__all__ = [
    'build_detector', 'describe', 'export_detector', 'load_detector', 'load_strictly', 'note_pruned', 'open_detector',
    'save_detector', 'write_detector', 'write_folder']

CONFIG_FILE = 'config.py'
WEIGHTS_FILE = 'model.safetensors'


def describe(cfg: Config, model: nn.Module, metainfo: Mapping[str, Any]) -> dict[str, Any]:
    """The header of a detector's file: config with the structural steps, the backbone's recipe, class names.

    Args:
        cfg: The whole config, training included.
        model: The detector, with its steps as `lean_steps`.
        metainfo: Of its dataset.
    """
    cfg = _self_contained(cfg, model)
    backbone = getattr(model, 'backbone', None)
    return {
        'format': format_version(cfg),
        'config': dump_config(cfg),
        'backbone': asdict(backbone.recipe) if isinstance(backbone, TimmBackbone) else None,
        'metainfo': {k: metainfo[k] for k in ('classes', 'palette') if k in metainfo},
    }


def save_detector(
        model: nn.Module, path: str | Path, header: Mapping[str, Any], weights: str = 'float',
) -> Int8Report | None:
    """Write a detector to one `.safetensors` file, atomically; of kernels that are pruned the live ones alone.

    Args:
        model: The detector.
        path: The file.
        header: What `describe` gave, and more if wanted.
        weights: 'float' or 'int8', as in `save_model`.

    Returns:
        For int8 the error of each weight, else None.
    """
    tensors, aliases = _untied(get_state_dict(model))
    steps = [*(header['backbone'] or {}).get('steps', []), *getattr(model, 'lean_steps', [])]
    warn_of_lost_zeros(model, steps)
    tensors, storage, report = store(tensors, weights, packed=True)
    version = {'format': INT8_VERSION} if 'int8' in storage else {}
    text = json.dumps({**header, **version, 'aliases': aliases, **storage})
    with atomic_file(path) as temporary:
        # one entry only: safetensors writes several in an order that changes from run to run
        save_file(tensors, temporary, metadata={DETECTOR_KEY: text})
    return report


def export_detector(
        config: str | Path | Config | None, checkpoint: str | Path, out_dir: str | Path, *,
        trust_imports: Sequence[str] = (), weights: str = 'float',
) -> Path:
    """Write a folder with `config.py` and `model.safetensors`, which `load_detector` and `init_detector` take.

    Args:
        config: The config it was trained with; None if the checkpoint, a `.safetensors` file, says it.
        checkpoint: `.safetensors` or `.pth`.
        out_dir: The folder.
        trust_imports: For a config from the checkpoint, see `load_detector`.
        weights: 'float' or 'int8', as in `save_model`.

    Raises:
        LeanError: The checkpoint does not fit the config, or the folder cannot be written.
    """
    return write_folder(open_detector(checkpoint, config, trust_imports=trust_imports), out_dir, weights)


def write_folder(model: Any, out_dir: str | Path, weights: str = 'float') -> Path:
    """Write a detector that has `cfg` and `dataset_meta` as the folder of `export_detector`.

    Args:
        model: What `open_detector` or `load_detector` gave, restructured or not.
        out_dir: The folder.
        weights: 'float' or 'int8', as in `save_model`.
    """
    header = describe(model.cfg, model, model.dataset_meta)
    with atomic_dir(out_dir) as temporary:
        (temporary / CONFIG_FILE).write_text(parse_config(header['config']).pretty_text)  # for people to edit
        save_detector(model, temporary / WEIGHTS_FILE, header, weights)
    return Path(out_dir)


def open_detector(
        source: str | Path, config: str | Path | Config | None = None, *, device: str | torch.device = 'cpu',
        trust_imports: Sequence[str] = (),
) -> nn.Module:
    """Load a detector from whatever there is of it: one of this package's files, or weights and their config.

    Args:
        source: As for `load_detector`; with a config also a `.pth` of MMDetection's model zoo or of a training.
        config: A config file, `'mmdet::...'`, `'timm_lean::...'` or an open config. It is trusted: it is code. None if
            the source says its config itself.
        device: Where to put it.
        trust_imports: For a config from the source, see `load_detector`.

    Returns:
        The detector in eval mode, with `cfg` and `dataset_meta`.

    Raises:
        LeanError: The source does not say which detector it holds, cannot be read, or does not fit the config.
    """
    if config is None:
        if not Path(source).is_dir() and not str(source).endswith('.safetensors'):
            raise LeanError(f'{source} does not say which detector it holds. Give its config.')
        return load_detector(source, device, trust_imports=trust_imports)
    cfg = copy.deepcopy(config) if isinstance(config, Config) else open_config(config)
    weights = Path(source) / WEIGHTS_FILE if Path(source).is_dir() else Path(source)
    adopt_structure(cfg, weights)
    model: Any = build_detector(cfg)
    meta = load_strictly(model, weights).get('meta', {})
    # files of MMDetection 2, half of its model zoo, have the names of the classes alone
    metainfo = meta.get('dataset_meta') or ({'classes': meta['CLASSES']} if 'CLASSES' in meta else {})
    note_pruned(model)
    model.cfg, model.dataset_meta = cfg, {'palette': 'random', **{k.lower(): v for k, v in metainfo.items()}}
    return model.to(device).eval()


def note_pruned(model: nn.Module) -> None:
    """Once the weights are loaded: where kernels were pruned, note how many, so that saving can tell a loss."""
    if isinstance(getattr(model, 'backbone', None), TimmBackbone):
        model.backbone.note_zeros()  # type: ignore[union-attr, operator]
    if has_step(model, PRUNED_STEP):
        note_zeros(model)


def write_detector(model: nn.Module, path: str | Path, weights: str = 'float') -> Int8Report | None:
    """Write a detector that has `cfg` and `dataset_meta` to a `.safetensors` file, with its structure as it is now.

    Args:
        model: What `open_detector` or `load_detector` gave, restructured or not.
        path: The file.
        weights: 'float' or 'int8', as in `save_model`.

    Returns:
        For int8 the error of each weight, else None.
    """
    header = describe(model.cfg, model, model.dataset_meta)  # type: ignore[arg-type]
    return save_detector(model, path, header, weights)


def load_detector(
        source: str | Path, device: str | torch.device = 'cpu', *, trust_imports: Sequence[str] = (),
) -> nn.Module:
    """Load an exported detector, or a file of `SafetensorsHook`, ready for `mmdet.apis.inference_detector`.

    The file may come from anywhere: its config is data, may name registered classes only, and follows no path or URL.

    Args:
        source: The folder or the `.safetensors` file. The folder's `config.py` is read as plain values and may be
            edited.
        device: Where to put it.
        trust_imports: Packages of yours that the detector's config may import, because its classes are registered
            there. Their code runs.

    Raises:
        CheckpointError: Something is missing, damaged, does not fit, or asks for more than a detector needs.
    """
    source = Path(source)
    weights = source / WEIGHTS_FILE if source.is_dir() else source
    if source.is_dir() and not (weights.is_file() and (source / CONFIG_FILE).is_file()):
        raise CheckpointError(f'{source} is not an exported detector: it has no {WEIGHTS_FILE} or no {CONFIG_FILE}.')
    header = detector_header(weights)
    text = _read_text(source / CONFIG_FILE) if source.is_dir() else header['config']
    name = str(source / CONFIG_FILE if source.is_dir() else source)
    cfg = check_config(parse_config(text, name), name, trust_imports)
    try:
        with registered_only():
            check_work(build_detector, cfg, tensor_shapes(weights), str(source))
            model: Any = build_detector(cfg)
        load_strictly(model, weights)
    except CheckpointError:
        raise
    except Exception as e:  # the detectors' classes check their arguments in their own ways
        reason = ' '.join((str(e) if isinstance(e, LeanError) else f'{type(e).__name__}: {e}').split())[:300]
        raise CheckpointError(f'{name} does not describe a detector that can be built: {reason}') from e
    note_pruned(model)
    model.dataset_meta = {'palette': 'random', **header['metainfo']}
    model.cfg = cfg
    return model.to(device).eval()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(f'{path} cannot be read: {e}') from e


def build_detector(cfg: Config) -> nn.Module:
    """Build the detector of a config, newly initialized and without files of its own."""
    register_all_modules(init_default_scope=False)
    if cfg.get('custom_imports'):
        import_modules_from_strings(**cfg['custom_imports'])
    init_default_scope(cfg.get('default_scope', 'mmdet'))
    if 'model' not in cfg:
        raise LeanError('The config has no model.')
    return MODELS.build(copy.deepcopy(cfg.model))  # some constructors take their settings apart


def load_strictly(model: nn.Module, path: str | Path, part: str = '') -> dict[str, Any]:
    """Load a checkpoint into a detector; every tensor must fit.

    Args:
        model: The detector.
        path: `.safetensors` or `.pth`.
        part: Check only the names that start with this; what fits of the rest is loaded.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: The checkpoint is another detector's; the message names tensors.
    """
    checkpoint = load_checkpoint(path)
    given = {k.removeprefix('module.'): v for k, v in checkpoint.get('state_dict', checkpoint).items()}
    if isinstance(getattr(model, 'backbone', None), TimmBackbone):
        model.backbone.adopt_names(given, 'backbone.')  # type: ignore[union-attr, operator]
    own = get_state_dict(model)
    found = misfit({k: tuple(v.shape) for k, v in own.items()}, {k: tuple(v.shape) for k, v in given.items()},
                   tied_names(model), part)
    if found:
        raise CheckpointError(f'{path} is the checkpoint of another detector than the config describes: {found}. '
                              'Give the config it was trained with, or another checkpoint.')
    model.load_state_dict(
        {k: v for k, v in given.items() if k not in own or v.shape == own[k].shape}, strict=False)
    return checkpoint


def _self_contained(cfg: Config, model: nn.Module) -> Config:
    """A copy of a config that names no files to initialize from, with steps, backbone's recipe and neck's channels."""
    cfg = Config(cfg.to_dict()) if hasattr(cfg, 'to_dict') else Config(dict(cfg))
    cfg.load_from, cfg.resume = None, False
    cfg.pop('work_dir', None)  # a place on the machine it was trained on; and equal runs give equal files
    if 'model' not in cfg:  # a Runner that was given a model, not its config
        return cfg
    set_steps(cfg, getattr(model, 'lean_steps', []))
    backbone = getattr(model, 'backbone', None)
    if isinstance(backbone, TimmBackbone):
        name, args = copy.deepcopy(backbone.recipe).create_args()
        old = cfg.model.backbone
        cfg.model.backbone = dict(
            type='timm_lean.TimmBackbone', model_name=name, model_args=args, out_indices=backbone.out_indices,
            frozen_stages=old.get('frozen_stages', -1), norm_eval=old.get('norm_eval', False))
        resolve_channels(cfg.model)
    elif 'backbone' in cfg.model:
        cfg.model.backbone.init_cfg = None
    return cfg


def _untied(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors that share no memory, and for those that were the same as another one the name of that."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[Any, str] = {}
    for name, value in state.items():
        value = value.detach()
        place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and place in seen:
            aliases[name] = seen[place]
            continue
        seen[place] = name
        whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.numel() * value.element_size()
        tensors[name] = value if whole else value.clone(memory_format=torch.contiguous_format)
    return tensors, aliases
