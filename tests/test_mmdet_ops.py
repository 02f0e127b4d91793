"""The stand-in for `mmcv._ext` is found as mmcv and mmengine look for it, and says what it has and what not."""

# ruff: noqa: E402  (the stand-in has to be in place before anything imports mmcv.ops)
from __future__ import annotations

import importlib.util
import inspect
import pickle
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

from timm_lean import mmcv_ext as ops

pytest.importorskip('mmcv')
ops.install()

import mmcv.ops
from mmcv import _ext


def run_python(code: str) -> str:
    """Run code in a fresh interpreter; return what it prints.

    `timm_lean` and `timm_lean.mmdet` are empty packages there: `ops` needs nothing of them, they install it themselves,
    and importing timm takes longer than the tests.
    """
    folder = Path(ops.__file__).parents[1]
    packages = f"""
        import sys, types
        for name, path in (("timm_lean", {str(folder.parent)!r}), ("timm_lean.mmdet", {str(folder)!r})):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [path]
    """
    code = textwrap.dedent(packages) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_install_imports_nothing_of_mmcv_and_is_idempotent() -> None:
    printed = run_python(
        """
        import sys
        from timm_lean import mmcv_ext as ops
        before = len(sys.meta_path)
        assert ops.install() and ops.install() and ops.installed()
        assert len(sys.meta_path) == before + 1
        print([name for name in sys.modules if name.split('.')[0] in ('mmcv', 'mmdet', 'mmengine')])
        """
    )
    assert printed == '[]'


def test_installed_too_late_still_serves_the_next_import() -> None:
    run_python(
        """
        from timm_lean import mmcv_ext as ops
        import mmcv
        try:
            import mmcv.ops
        except ModuleNotFoundError:
            ops.install()
        import mmcv.ops
        assert mmcv._ext.nms is not None
        """
    )


def test_compiled_extension_wins(tmp_path) -> None:
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').write_text("__version__ = '2.1.0'\n")
    (package / '_ext.py').write_text("def nms(*args, **kwargs): return 'compiled'\n")
    printed = run_python(
        f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from timm_lean import mmcv_ext as ops
        assert not ops.install() and not ops.installed()
        assert set(ops.ops_status().values()) == {{ops.COMPILED}}
        import mmcv._ext
        assert not ops.install() and set(ops.ops_status().values()) == {{ops.COMPILED}}
        print(mmcv._ext.nms())
        """
    )
    assert printed == 'compiled'


def test_compiled_extension_that_comes_later_wins_too(tmp_path) -> None:
    (tmp_path / 'mmcv').mkdir()
    (tmp_path / 'mmcv' / '__init__.py').touch()
    (tmp_path / 'mmcv' / '_ext.py').touch()
    run_python(
        f"""
        from timm_lean import mmcv_ext as ops
        assert ops.install() and ops.installed()
        sys.path.insert(0, {str(tmp_path)!r})
        import mmcv._ext
        assert not hasattr(mmcv._ext, "nms") and not ops.installed()
        """
    )


def test_without_mmcv_everything_is_missing_and_nothing_breaks() -> None:
    run_python(
        """
        import importlib.util
        real = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *a: None if name == 'mmcv' else real(name, *a)
        from timm_lean import mmcv_ext as ops
        ops.install()
        assert set(ops.ops_status().values()) == {ops.MISSING}
        """
    )


def test_module_looks_like_a_real_one() -> None:
    spec = importlib.util.find_spec('mmcv._ext')
    assert spec is not None and spec.loader is not None and spec.name == 'mmcv._ext'
    assert _ext.__spec__ is spec and _ext.__loader__ is spec.loader and _ext.__file__ == spec.origin
    assert sys.modules['mmcv._ext'] is _ext is mmcv._ext
    assert not hasattr(_ext, '__path__')
    from mmcv.utils.ext_loader import check_ops_exist
    from mmengine.utils.dl_utils import mmcv_full_available

    with warnings.catch_warnings():
        warnings.simplefilter('ignore', DeprecationWarning)  # pkgutil.find_loader, from Python 3.12
        if sys.version_info < (3, 14):
            assert check_ops_exist() and mmcv_full_available()
    with pytest.raises(AttributeError, match='__wrapped__'):
        _ext.__wrapped__  # noqa: B018
    assert inspect.getmodule(_ext.nms) is not None
    assert pickle.loads(pickle.dumps(_ext.nms)) is _ext.nms


def test_status_names_what_mmcv_asks_for() -> None:
    status = ops.ops_status()
    provided = {name for names in ops.SUPPORTED.values() for name in names}
    assert {name for name, kind in status.items() if kind == ops.STAND_IN} >= provided
    assert status['nms_rotated'] == status['correlation_forward'] == ops.MISSING
    # Every name asked for exists, or `import mmcv.ops` would have failed.
    assert all(hasattr(_ext, name) for name in status)


def test_unsupported_operator_says_which_and_what_to_do() -> None:
    boxes, scores = torch.rand(3, 5), torch.rand(3)
    with pytest.raises(NotImplementedError, match=r"'nms_rotated'.*compiled mmcv"):
        mmcv.ops.nms_rotated(boxes, scores, 0.5)


def test_collect_env_reports_the_stand_in() -> None:
    assert 'stand-in' in mmcv.ops.get_compiler_version()
    assert mmcv.ops.get_compiling_cuda_version() == 'not available'
