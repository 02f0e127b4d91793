"""What is installed, what of it works, and what to do about the rest; with or without MMDetection.

Nothing of mmengine, mmcv or mmdet is imported by this file itself: a broken installation is what it is for.
"""
import argparse
import importlib.util
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib.machinery import PathFinder
from importlib.metadata import distributions

from .arguments import add_json
from .opening import finish, progress

HELP = 'what is installed, what works, what is missing'

_CORE = ('torch', 'torchvision', 'timm', 'safetensors', 'numpy')
# Distributions that own the same import name; the first is the one in the extra 'mmdet'.
_ALTERNATIVES = {
    'mmengine': ('mmengine', 'mmengine-lite', 'onedl-mmengine'),
    'mmcv': ('mmcv-lite', 'mmcv', 'mmcv-full', 'onedl-mmcv'),
    'mmdet': ('mmdet', 'onedl-mmdetection', 'onedl-mmdet'),
    'cv2': ('opencv-python', 'opencv-python-headless', 'opencv-contrib-python', 'opencv-contrib-python-headless'),
}
_PROBLEM, _NO_PROBLEMS = 'PROBLEM: ', 'no problems found'
_EXTRA = "pip install 'timm-lean[mmdet]'"
_LOAD_EXTENSION = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location('mmcv._ext', sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
"""


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_json(p)


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis; returns 0 if all that is installed works, else 1."""
    with progress(args):
        lines, status = diagnose()
    problems = [line.removeprefix(_PROBLEM) for line in lines if line.startswith(_PROBLEM)]
    found = [line for line in lines if not line.startswith(_PROBLEM) and line != _NO_PROBLEMS]
    finish(args, {'found': found, 'problems': problems}, '\n'.join(lines))
    return status


def diagnose() -> tuple[list[str], int]:
    """Look at the environment.

    Returns:
        Lines to print, and 0 or, if something is broken, 1. MMDetection that is not installed is not broken.
    """
    from timm_lean.version import __version__
    versions = _versions()
    lines = [f'timm-lean {__version__}, Python {platform.python_version()}, {platform.platform()}']
    lines.append(_listed(f'{name} {versions.get(name, "not installed")}' for name in _CORE))
    lines.append('devices: ' + _listed(_devices()))
    problems: list[str] = []
    missing = [name for name in ('mmengine', 'mmcv', 'mmdet', 'pycocotools') if importlib.util.find_spec(name) is None]
    for module in _ALTERNATIVES:
        found = [name for name in _ALTERNATIVES[module] if name in versions]
        problems += _duplicates(module, found, versions)
        lines.append(f'{module}: ' + (_listed(f'{name} {versions[name]}' for name in found) or 'not installed'))
    if len(missing) == 4:
        return [*lines, f'MMDetection: not installed (optional). {_EXTRA} brings it.', *_tail(problems)], int(
            bool(problems))
    if missing:
        problems.append(f'MMDetection is incomplete: {_listed(missing)} missing. {_EXTRA}')
    problems += _opencv_problem() + _pkg_resources_problem(versions)
    if 'mmcv' not in missing:
        line, problem = _operators()
        lines.append(line)
        problems += problem
    if not missing:
        line, problem = _import_mmdet()
        lines.append(line)
        problems += problem
        if importlib.util.find_spec('seaborn') is None:
            lines.append("seaborn: not installed; only MMDetection's analyze_logs.py needs it (pip install seaborn)")
    return [*lines, *_tail(problems)], int(bool(problems))


def _tail(problems: list[str]) -> list[str]:
    return [_PROBLEM + problem for problem in problems] or [_NO_PROBLEMS]


def _listed(items: Iterable[str]) -> str:
    return ', '.join(items)


def _versions() -> dict[str, str]:
    """Installed distributions by normalized name."""
    found: dict[str, str] = {}
    for distribution in distributions():
        name = distribution.metadata['Name']
        if name:
            found.setdefault(re.sub(r'[-_.]+', '-', name).lower(), distribution.version)
    return found


def _devices() -> list[str]:
    import torch
    names = [f'cuda:{i} {torch.cuda.get_device_name(i)}' for i in range(torch.cuda.device_count())]
    built = f'torch is built for CUDA {torch.version.cuda}' if torch.version.cuda else 'torch is built without CUDA'
    return ['cpu', *names, f'{torch.get_num_threads()} threads', built]


def _duplicates(module: str, found: list[str], versions: dict[str, str]) -> list[str]:
    """Several distributions that write into the same folder: the last one installed has overwritten the others."""
    if len(found) < 2:
        return []
    # a compiled mmcv, or a maintained fork, is there because somebody chose it; the extra's was pulled in
    remove, keep = found[0], found[1]
    if module == 'cv2':
        keep, remove = next((n for n in found if 'headless' in n), found[0]), ''
        remove = _listed(n for n in found if n != keep).replace(',', '')
    return [f'{_listed(found)} own the same folder {module}/, and whichever was installed last overwrote the other. '
            f'Remove {remove}: pip uninstall {remove}; '
            f'pip install --force-reinstall --no-deps {keep}=={versions[keep]}']


def _opencv_problem() -> list[str]:
    if importlib.util.find_spec('cv2') is None:
        return ['opencv is missing, which mmcv needs: pip install opencv-python-headless']
    result = _python('import cv2')
    if not result:
        return []
    if 'libGL' in result or 'libgthread' in result or '.so' in result:
        return [f'opencv does not load ({result}). Install the library (Debian: apt-get install libgl1 libglib2.0-0), '
                'or use the build that needs no screen: pip uninstall opencv-python; '
                'pip install opencv-python-headless']
    return [f'opencv does not load: {result}']


def _pkg_resources_problem(versions: dict[str, str]) -> list[str]:
    if 'mmengine' not in versions or importlib.util.find_spec('pkg_resources') is not None:
        return []
    return [f'mmengine reads configs that inherit from a package (mmdet::...) by pkg_resources, which setuptools '
            f'{versions.get("setuptools", "(not installed)")} does not have. timm_lean.mmdet does without it, '
            "MMDetection's own tools do not: pip install 'setuptools<82'"]


def _operators() -> tuple[str, list[str]]:
    """Where the operators of mmcv come from, and whether a compiled extension loads with this torch."""
    spec = importlib.util.find_spec('mmcv')
    path = list(spec.submodule_search_locations or []) if spec else []
    extension = PathFinder.find_spec('mmcv._ext', path)
    if extension is None or extension.origin is None:
        return 'mmcv operators: no compiled ones; ' + _stand_in(), []
    error = _python(_LOAD_EXTENSION, extension.origin)
    if not error:
        return f'mmcv operators: compiled, {extension.origin}', []
    return f'mmcv operators: compiled for another torch, {extension.origin}', [
        f'the compiled mmcv does not load with the installed torch ({error}). Build mmcv again for it, or use the '
        'stand-in: pip uninstall mmcv mmcv-full onedl-mmcv; pip install --force-reinstall --no-deps "mmcv-lite<2.2"']


def _stand_in() -> str:
    try:
        from timm_lean.mmcv_ext import MISSING, STAND_IN, install, ops_status
        install()
        status = ops_status()
    except Exception:  # the reason is reported where MMDetection is imported
        return 'the stand-in does not import'
    missing = [name for name, source in status.items() if source == MISSING]
    text = f'{list(status.values()).count(STAND_IN)} by the torchvision/torch stand-in'
    return text + (f'; without one: {_listed(missing[:6])} ... ({len(missing)})' if missing else '')


def _import_mmdet() -> tuple[str, list[str]]:
    error = _python('import timm_lean.mmdet')
    if not error:
        return 'timm_lean.mmdet: imports, MMDetection is ready', []
    return 'timm_lean.mmdet: does not import', [f'MMDetection does not import: {error}']


def _python(code: str, *arguments: str) -> str:
    """Run code in a new interpreter, which a broken library may crash; returns the last line of its error, or ''."""
    result = subprocess.run(
        [sys.executable, '-c', code, *arguments], capture_output=True, text=True, check=False, timeout=300)
    if result.returncode == 0:
        return ''
    lines = result.stderr.strip().splitlines()
    return lines[-1][:300] if lines else f'exit code {result.returncode}'
