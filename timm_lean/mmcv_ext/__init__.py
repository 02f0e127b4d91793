"""A stand-in for `mmcv._ext`, the compiled half of mmcv that the `mmcv-lite` wheel leaves out.

`mmdet.models` imports `mmcv.ops`, and every file there asks `mmcv._ext` for its kernels, so without them MMDetection
cannot even be imported. mmcv-lite carries all the Python of `mmcv/ops`; only that one module is missing. `install()`
makes it importable, with kernels computed by torchvision and torch under the call signatures that the Python side
uses.

The stand-in sits at the level of `_ext` because mmdet binds names early (`from mmcv.ops import batched_nms`): a
function patched in later would reach some callers and not others. It is a finder at the *end* of `sys.meta_path`, so
that nothing of mmcv is imported to install it, and a compiled `mmcv._ext` is always found first and wins by itself.

Limits. Operators that no detector of MMDetection needs raise `NotImplementedError` when called. A process started
with `spawn` must import the plugin too. The kernels have no CPU-only code in them, but were run on CPUs only.

Source: the calls in `mmcv/ops/*.py` of mmcv 2.1.0, whose documented behaviour is kept; the differences are in each
docstring.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

__all__ = ['COMPILED', 'MISSING', 'STAND_IN', 'SUPPORTED', 'install', 'installed', 'ops_status', 'unsupported']

EXTENSION = 'mmcv._ext'

COMPILED = 'compiled'
STAND_IN = 'torchvision/torch stand-in'
MISSING = 'missing'

SUPPORTED: dict[str, tuple[str, ...]] = {
    'boxes': ('nms', 'softnms', 'nms_match', 'bbox_overlaps'),
    'roi': ('roi_align_forward', 'roi_align_backward', 'roi_pool_forward', 'roi_pool_backward'),
    'deform': (
        'deform_conv_forward',
        'deform_conv_backward_input',
        'deform_conv_backward_parameters',
        'modulated_deform_conv_forward',
        'modulated_deform_conv_backward',
    ),
    'losses': (
        'sigmoid_focal_loss_forward',
        'sigmoid_focal_loss_backward',
        'softmax_focal_loss_forward',
        'softmax_focal_loss_backward',
    ),
    'sampling': (
        'ms_deform_attn_forward',
        'ms_deform_attn_backward',
        'masked_im2col_forward',
        'masked_col2im_forward',
    ),
    'reassembly': ('carafe_forward', 'carafe_backward', 'carafe_naive_forward', 'carafe_naive_backward'),
}
"""Submodule of this package -> the `_ext` functions it provides."""


def unsupported(name: str) -> Callable[..., NoReturn]:
    """Build the function that stands for an operator this package does not provide.

    Args:
        name: Name of the `_ext` function.

    Returns:
        A function of any arguments that raises `NotImplementedError` naming the operator and the remedy. It has to
        exist, because `mmcv.ops` asserts the presence of every operator when it is imported, whether or not a model
        uses it.
    """

    def missing_op(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f'mmcv operator {name!r} has no torchvision/torch stand-in in timm-lean. Install a compiled mmcv instead '
            'of mmcv-lite: pip uninstall mmcv-lite, then build mmcv (or onedl-mmcv) for this version of torch.'
        )

    missing_op.__name__ = missing_op.__qualname__ = name
    return missing_op


class _Loader(importlib.abc.Loader):
    """Fills the stand-in module; the kernels are imported here, not before something asks for `mmcv._ext`."""

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        for submodule, names in SUPPORTED.items():
            kernels = importlib.import_module(f'{__name__}.{submodule}')
            for name in names:
                setattr(module, name, getattr(kernels, name))

        def getattr_of_module(name: str) -> Callable[..., NoReturn]:
            # Operators have no leading underscore; the import system and inspect probe for names that do.
            if name.startswith('_'):
                raise AttributeError(f'module {EXTENSION!r} has no attribute {name!r}')
            return unsupported(name)

        # The two versions are what mmcv.utils.collect_env prints.
        module.__dict__.update(
            get_compiler_version=lambda: f'none ({STAND_IN} of timm-lean)',
            get_compiling_cuda_version=lambda: 'not available',
            __getattr__=getattr_of_module,
        )


class _Finder(importlib.abc.MetaPathFinder):
    """Finds `mmcv._ext` when nothing before it on `sys.meta_path` did."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != EXTENSION:
            return None
        # A spec with a location gives the module a `__file__`, which mmengine's pkgutil.find_loader check relies on.
        return importlib.util.spec_from_file_location(fullname, __file__, loader=_Loader())


def _mmcv_path() -> list[str] | None:
    """Folders of the installed `mmcv` package, found without importing it; None when there is none."""
    loaded = sys.modules.get('mmcv')
    if loaded is not None:
        return list(getattr(loaded, '__path__', []))
    spec = importlib.util.find_spec('mmcv')
    return list(spec.submodule_search_locations or []) if spec else None


def _compiled_spec() -> ModuleSpec | None:
    """Spec of a compiled `mmcv._ext`, if any finder but the stand-in's has one."""
    loaded = sys.modules.get(EXTENSION)
    if loaded is not None:
        spec = loaded.__spec__
        return None if spec is None or isinstance(spec.loader, _Loader) else spec
    path = _mmcv_path()
    if path is None:
        return None
    for finder in sys.meta_path:
        if not isinstance(finder, _Finder) and (spec := finder.find_spec(EXTENSION, path)) is not None:
            return spec
    return None


def installed() -> bool:
    """Whether the stand-in is what `import mmcv._ext` gives (or would give, once mmcv is installed)."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path) and _compiled_spec() is None


def install() -> bool:
    """Make `mmcv._ext` importable. Idempotent; imports nothing of mmcv.

    A compiled `mmcv._ext` is left alone. Call it before anything imports `mmcv.ops`: that import fails otherwise (and
    may be repeated once this has been called).

    Returns:
        True if the stand-in is in place, False if a compiled extension was found.
    """
    if _compiled_spec() is not None:
        return False
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
    return True


def _requested_ops(path: Sequence[str]) -> list[str]:
    """Names that mmcv's own Python asks `_ext` for, read from its sources (`ext_loader.load_ext('_ext', [...])`)."""
    names: set[str] = set()
    for file in (file for folder in path for file in Path(folder, 'ops').glob('*.py')):
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == 'load_ext':
                constants = (item.value for item in ast.walk(node.args[-1]) if isinstance(item, ast.Constant))
                names.update(value for value in constants if isinstance(value, str))
    return sorted(names)


def ops_status() -> dict[str, str]:
    """Say where each operator comes from.

    Returns:
        `_ext` function -> `COMPILED`, `STAND_IN` or `MISSING`, for the functions of this package and those the
        installed mmcv asks for. `COMPILED` says that a compiled extension was found, not that it loads with this
        torch. Without mmcv all are `MISSING`.
    """
    provided = {'get_compiler_version', 'get_compiling_cuda_version'}.union(*SUPPORTED.values())
    path = _mmcv_path()
    if path is None:
        return dict.fromkeys(sorted(provided), MISSING)
    names = sorted(provided | set(_requested_ops(path)))
    if _compiled_spec() is not None:
        return dict.fromkeys(names, COMPILED)
    return {name: STAND_IN if installed() and name in provided else MISSING for name in names}
