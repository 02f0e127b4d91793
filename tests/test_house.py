"""The house's layout: who imports whom, read from the code itself, held against the table in CONTRIBUTING.md."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'timm_lean'


def table() -> dict[str, set[str]]:
    """Room to the rooms it may use, from CONTRIBUTING.md."""
    rows = re.findall(r'^\| `([a-z_/.]+)` \|[^|]*\|([^|]*)\|$', (ROOT / 'CONTRIBUTING.md').read_text(), re.MULTILINE)
    return {room.rstrip('/'): set(re.findall(r'`([a-z_.]+)`', uses)) for room, uses in rows}


def room_of(path: Path) -> str:
    """The room a file of the package lies in; a file beside the rooms is one of its own."""
    return path.relative_to(PACKAGE).parts[0]


def imported(path: Path) -> set[str]:
    """Absolute names of all modules a file imports, inside functions too, of what `from x import y` names both."""
    package = [*path.relative_to(ROOT).with_suffix('').parts][:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            module = '.'.join([*base, *([node.module] if node.module else [])])
            names.add(module)
            names.update(f'{module}.{alias.name}' for alias in node.names)
    return names


def rooms_used(path: Path) -> set[str]:
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir()} | {p.name for p in PACKAGE.glob('*.py')}
    used = set()
    for name in imported(path):
        parts = name.split('.')
        if parts[0] == 'timm_lean_cli':
            used.add('timm_lean_cli')
        if parts[0] == 'timm_lean' and len(parts) > 1:
            used |= {parts[1], f'{parts[1]}.py'} & rooms
    return used


SOURCES = sorted(
    p for p in PACKAGE.rglob('*.py') if p.name not in ('__init__.py', '__main__.py') or p.parent != PACKAGE)


def test_every_room_is_in_the_table():
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and list(p.glob('*.py'))}
    rooms |= {p.name for p in PACKAGE.glob('*.py')} - {'__init__.py', '__main__.py'}
    assert rooms == table().keys()


def test_the_table_has_no_circle():
    """The rooms can be put in an order in which each uses earlier ones only."""
    left, done = {k: v for k, v in table().items() if k != 'registry.py'}, set()
    while left:
        free = {room for room, uses in left.items() if uses <= done}
        assert free, f'circle among {sorted(left)}'
        done |= free
        left = {k: v for k, v in left.items() if k not in free}


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = room_of(path)
    used = rooms_used(path) - {room}
    assert used <= table()[room], f'{room} uses {sorted(used - table()[room])}, which CONTRIBUTING.md does not allow'


TECHNIQUES = [p for p in SOURCES if room_of(p) in ('pruning', 'sharing', 'depth')]


@pytest.mark.parametrize('path', TECHNIQUES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_techniques_know_recipes_and_no_files(path):
    used = {name for name in imported(path) if name.startswith('timm_lean.checkpoint.')}
    assert all(name.startswith('timm_lean.checkpoint.recipe') for name in used), used


def test_argparse_is_the_command_lines_alone():
    assert not {str(p.relative_to(PACKAGE)) for p in SOURCES if 'argparse' in imported(p)}


def test_importing_the_package_knows_all_steps_and_loads_nothing_that_only_some_commands_need():
    """In a fresh process. Whichever room is imported first, the package itself comes before it.

    torch and timm are seconds; what comes on top should not be felt.
    """
    heavy = {'cv2', 'matplotlib', 'mmengine', 'mmdet', 'onnx', 'onnxruntime', 'pandas', 'scipy', 'sklearn'}
    code = ('import sys, timm\n'
            'before = set(sys.modules)\n'
            'import timm_lean.measure\n'
            'from timm_lean.checkpoint.recipe import list_steps\n'
            'print(*list_steps())\n'
            'import timm_lean.training\n'
            'print(*{name.split(".")[0] for name in set(sys.modules) - before})')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    steps, loaded = (set(line.split()) for line in result.stdout.splitlines())
    assert steps == {'fold', 'prune_kernels', 'remove_blocks', 'resize', 'share'}
    assert 'timm_lean' in loaded and not heavy & loaded
