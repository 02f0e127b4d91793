"""`doctor` with and without MMDetection, and on broken installations."""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from timm_lean_cli import doctor, main

INSTALLED = all(importlib.util.find_spec(name) for name in ('mmengine', 'mmcv', 'mmdet'))


def test_this_environment(capsys, monkeypatch):
    lines, status = doctor.diagnose()
    assert lines[0].startswith('timm-lean ') and 'torch ' in lines[1] and lines[2].startswith('devices: cpu')
    if INSTALLED:
        assert any(re.search(r'compiled, /|[1-9]\d* by the torchvision/torch stand-in', line) for line in lines)
        assert any('MMDetection is ready' in line or 'does not import' in line for line in lines)
    else:
        assert status == 0 and any("pip install 'timm-lean[mmdet]'" in line for line in lines)
    monkeypatch.setattr(doctor, 'diagnose', lambda: (lines, status))
    assert main(['doctor']) == status
    assert capsys.readouterr().out.splitlines() == lines


def test_missing_mmdet_is_a_clear_error():
    """Whatever is installed here, without mmengine the package says which extra brings it."""
    code = ('import sys, importlib.util as u; find = u.find_spec\n'
            'u.find_spec = lambda n, *a: None if n in ("mmengine", "mmcv", "mmdet") else find(n, *a)\n'
            'import timm_lean.mmdet')
    root = str(Path(doctor.__file__).parents[1])
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                            env={**os.environ, 'PYTHONPATH': root})
    last = result.stderr.strip().splitlines()[-1]
    assert 'PackageMissingError' in last and "pip install 'timm-lean[mmdet]'" in last


@pytest.fixture
def healthy(monkeypatch):
    """An environment with all of MMDetection, whatever is installed here."""
    versions = dict.fromkeys(('torch', 'mmengine', 'mmcv-lite', 'mmdet', 'opencv-python'), '1.0')
    find = importlib.util.find_spec
    names = ('mmengine', 'mmcv', 'mmdet', 'pycocotools', 'cv2', 'pkg_resources')
    monkeypatch.setattr(doctor, '_versions', lambda: versions)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n, *a: True if n in names else find(n, *a))
    monkeypatch.setattr(doctor, '_python', lambda *a: '')
    monkeypatch.setattr(doctor, '_operators', lambda: ('mmcv operators: ...', []))
    return versions


def test_healthy(healthy):
    lines, status = doctor.diagnose()
    assert status == 0 and lines[-1] == 'no problems found' and 'mmcv: mmcv-lite 1.0' in lines


@pytest.mark.parametrize('added, removed, kept', [
    ('mmcv', 'mmcv-lite', 'mmcv==2.0'), ('onedl-mmcv', 'mmcv-lite', 'onedl-mmcv==2.0'),
    ('onedl-mmengine', 'mmengine', 'onedl-mmengine==2.0'),
    ('opencv-python-headless', 'opencv-python', 'opencv-python-headless==2.0'),
])
def test_double_distributions_name_the_one_to_remove(healthy, added, removed, kept):
    healthy[added] = '2.0'
    lines, status = doctor.diagnose()
    problem = lines[-1]
    assert status == 1 and problem.startswith('PROBLEM') and f'pip uninstall {removed};' in problem and kept in problem


def test_opencv_without_libgl(healthy, monkeypatch):
    monkeypatch.setattr(doctor, '_python', lambda code, *a: (
        'ImportError: libGL.so.1: cannot open shared object file' if 'cv2' in code else ''))
    lines, status = doctor.diagnose()
    assert status == 1 and 'libgl1' in lines[-1] and 'headless' in lines[-1]


def test_mmdet_that_does_not_import(healthy, monkeypatch):
    monkeypatch.setattr(doctor, '_python', lambda code, *a: (
        'AssertionError: MMCV==2.2.0 is used but incompatible' if 'timm_lean' in code else ''))
    lines, status = doctor.diagnose()
    assert status == 1 and lines[-1].endswith('MMCV==2.2.0 is used but incompatible')


def test_incomplete_installation(healthy, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n, *a: None if n == 'pycocotools' else find(n, *a))
    lines, status = doctor.diagnose()
    assert status == 1 and 'pycocotools missing' in lines[-1]


def test_compiled_extension_of_another_torch(tmp_path, monkeypatch):
    """A shared object that cannot be loaded is found, tried in a process of its own, and reported."""
    package = tmp_path / 'mmcv'
    package.mkdir()
    (package / '__init__.py').write_text('')
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (package / f'_ext{suffix}').write_bytes(b'not a library')
    spec = importlib.util.spec_from_file_location(
        'mmcv', package / '__init__.py', submodule_search_locations=[str(package)])
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n, *a: spec if n == 'mmcv' else find(n, *a))
    line, problems = doctor._operators()
    assert 'compiled for another torch' in line and 'mmcv-lite<2.2' in problems[0] and 'ImportError' in problems[0]


def test_setuptools_without_pkg_resources(healthy, monkeypatch):
    healthy['setuptools'] = '84.0'
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n, *a: None if n == 'pkg_resources' else find(n, *a))
    lines, status = doctor.diagnose()
    assert status == 1 and 'setuptools 84.0' in lines[-1] and "pip install 'setuptools<82'" in lines[-1]


@pytest.mark.parametrize('installed', [True, False])
def test_seaborn(healthy, monkeypatch, installed):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda n, *a: (True if installed else None) if n == 'seaborn' else find(n, *a))
    lines, status = doctor.diagnose()
    assert status == 0 and any('analyze_logs.py' in line for line in lines) != installed
