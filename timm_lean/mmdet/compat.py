"""Mends of mmengine and mmdet for today's torch and Python, each as narrow as its fault, applied only where that is.

mmengine 0.10.7 and mmdet 3.3.0 are the last releases of early 2025 and 2024. What broke since, or always was broken,
and stops a user of this package, is mended here at run time; no file of theirs is touched and nothing of torch is
patched. `apply()` says what it did.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = [
    'apply', 'mend_checkpoint_loading', 'mend_config_inheritance', 'mend_find_loader', 'mend_ssd_predict', 'mend_train',
    'silence_autocast',
]

STATISTICS = ('min', 'max', 'mean', 'current')
"""Methods that a pickled `HistoryBuffer` refers to."""


def _statistic(owner: Any, name: str) -> Any:
    """What unpickling calls for `builtins.getattr`: looks up the statistics of `HistoryBuffer`, and nothing else."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in STATISTICS:
        raise ValueError(f"checkpoint refers to attribute {name!r} of {owner!r}, which is none of a log's statistics")
    return getattr(owner, name)


@functools.cache
def _checkpoint_globals() -> list[Any]:
    """What mmengine's own checkpoints hold besides tensors and plain data: logged scalars, in numpy arrays."""
    from mmengine.logging import HistoryBuffer

    allowed: list[Any] = [HistoryBuffer, np.ndarray, np.dtype, (_statistic, 'builtins.getattr')]
    # numpy renamed its package between 1 and 2; checkpoints of both are about.
    core = 'numpy._core' if int(np.__version__.split('.')[0]) >= 2 else 'numpy.core'
    multiarray = importlib.import_module(f'{core}.multiarray')
    for package in ('numpy.core', 'numpy._core'):
        for name in ('_reconstruct', 'scalar'):
            allowed.append((getattr(multiarray, name), f'{package}.multiarray.{name}'))
    allowed += [kind for kind in vars(np.dtypes).values() if isinstance(kind, type) and issubclass(kind, np.dtype)]
    return allowed


def mend_checkpoint_loading() -> bool:
    """Let mmengine load its own checkpoints: resume, `load_from`, `init_detector`.

    Since torch 2.6 `torch.load` unpickles only what it knows. mmengine 0.10.7 stores its log (`HistoryBuffer`, numpy
    arrays) beside the weights, so `torch.load` refuses every checkpoint mmengine wrote itself. Later versions of
    mmengine pass `weights_only=False`; where that is so nothing is done here.

    Trust boundary: `torch.load` stays in its safe mode, and while mmengine loads a checkpoint (through any of its
    backends) the log's classes are allowed too. They are data: numpy arrays and numbers, and the buffer with its four
    statistics. A file that names anything else is refused as before, so a checkpoint from a stranger cannot run code.
    Someone who stores objects of their own in `meta` allows their classes with
    `torch.serialization.add_safe_globals`.

    Returns:
        Whether the mend is in place.
    """
    from mmengine.runner import checkpoint

    loader = checkpoint.CheckpointLoader
    original = loader.load_checkpoint.__func__
    if getattr(original, 'mended_by_timm_lean', False):
        return True
    if 'weights_only' in inspect.getsource(checkpoint.load_from_local):
        return False

    @functools.wraps(original)
    def load_checkpoint(cls: type, *args: Any, **kwargs: Any) -> Any:
        with torch.serialization.safe_globals(_checkpoint_globals()):
            return original(cls, *args, **kwargs)

    load_checkpoint.mended_by_timm_lean = True  # type: ignore[attr-defined]
    loader.load_checkpoint = classmethod(load_checkpoint)
    return True


def mend_ssd_predict() -> bool:
    """Let SSD predict.

    The dense heads' shared prediction asks `self.loss_cls` for custom activations; mmdet 3.3.0's `SSDHead` computes
    its loss itself and has no such attribute, so every SSD raises `AttributeError` in predict. None says what is the
    case: no custom activation.

    Returns:
        Whether the mend is in place.
    """
    from mmdet.models.dense_heads import SSDHead

    if hasattr(SSDHead, 'loss_cls'):
        return SSDHead.loss_cls is None
    SSDHead.loss_cls = None
    return True


def mend_train() -> bool:
    """Let `train()` and `eval()` of MMDetection's models return the model, as torch's do.

    Backbones and detectors that override `train` return nothing, so that `model.eval()` is None. Whoever goes on with
    that, as Torch-Pruning does, fails far from the cause ("'NoneType' object has no attribute 'named_modules'").

    Returns:
        Whether the mend is in place.
    """
    from mmdet.registry import MODELS

    def returning_self(train: Any) -> Any:
        @functools.wraps(train)
        def mended(self: Any, mode: bool = True) -> Any:
            train(self, mode)
            return self

        mended.mended_by_timm_lean = True  # type: ignore[attr-defined]
        return mended

    registered = [kind for kind in MODELS.module_dict.values() if inspect.isclass(kind)]
    owners: set[Any] = {base for kind in registered for base in kind.__mro__ if 'train' in vars(base)}
    for owner in owners - {torch.nn.Module}:
        if not getattr(owner.train, 'mended_by_timm_lean', False):
            owner.train = returning_self(owner.train)
    return True


def mend_config_inheritance() -> bool:
    """Let configs inherit from packages (`_base_ = 'mmdet::...'`) without `pkg_resources`.

    mmengine asks it whether and where a package is installed. setuptools 82 removed it, and Python 3.12 brings no
    setuptools at all. Only names in the two modules that look up configs are replaced.

    Returns:
        Whether the mend is in place.
    """
    if importlib.util.find_spec('pkg_resources') is not None:
        return False
    from mmengine.config import config, utils
    from mmengine.hub import hub

    modules = {package: module for module, package in utils.MODULE2PACKAGE.items()}

    def is_installed(package: str) -> bool:
        return importlib.util.find_spec(modules.get(package, package)) is not None

    def get_installed_path(package: str) -> str:
        spec = importlib.util.find_spec(modules.get(package, package))
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(f'{package} is not installed')
        return str(Path(spec.origin).parent)

    def require(package: str) -> None:  # mmengine's would install it
        get_installed_path(package)

    config.is_installed, hub.install_package = is_installed, require
    for module in (config, hub):
        module.get_installed_path = get_installed_path
    return True


def mend_find_loader() -> bool:
    """Give mmengine and mmcv the `pkgutil.find_loader` they look for `mmcv._ext` with.

    Python 3.14 removed it. Only the name `pkgutil` inside the two modules that call it is replaced.

    Returns:
        Whether the mend is in place.
    """
    if hasattr(pkgutil, 'find_loader'):
        return False
    from mmcv.utils import ext_loader
    from mmengine.utils.dl_utils import misc

    def find_loader(fullname: str) -> Any:
        spec = importlib.util.find_spec(fullname)
        return spec and spec.loader

    for module in (ext_loader, misc):
        module.pkgutil = types.SimpleNamespace(find_loader=find_loader)
    return True


def silence_autocast() -> bool:
    """Keep torch from telling with every batch that mmdet 3.3.0 writes `torch.cuda.amp.autocast`, its older name.

    It means the same, and a user can do nothing about it. Other warnings, and this one from other code, stay.

    Returns:
        True.
    """
    warnings.filterwarnings(
        'ignore', message=r'`?torch\.cuda\.amp\.autocast', category=FutureWarning, module=r'mmdet\.')
    return True


def apply() -> list[str]:
    """Apply every mend that the installed versions need. Idempotent.

    Imports mmengine and, where it is installed, mmdet's models: call `ops.install()` first.

    Returns:
        Names of the mends in place.
    """
    mends = [mend_find_loader, mend_config_inheritance, mend_checkpoint_loading]
    if importlib.util.find_spec('mmdet') is not None:
        mends += [mend_ssd_predict, mend_train, silence_autocast]
    return [mend.__name__ for mend in mends if mend()]
