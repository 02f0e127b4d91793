"""Detector configs as data: written as assignments of literals, and read back without running them.

A dumped config, ours or `Config.pretty_text`, consists of assignments of literals and `dict(...)`. Reading it as such
keeps tuples, which JSON would lose, and runs no code of a file somebody else made.
"""
import ast
import math
import pprint
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.hub import get_config

from timm_lean.errors import CheckpointError, LeanError

from .configs import PREFIX, config_file

__all__ = ['dump_config', 'open_config', 'parse_config', 'set_data_root']

_NAMES = {'inf': math.inf, 'nan': math.nan}
_MAX_TEXT = 1_000_000  # characters; MMDetection's largest config has 17,520


def dump_config(cfg: Config) -> str:
    """A config as text that `parse_config` reads; `Config.pretty_text` reads better but takes a second."""
    values = sorted(cfg.to_dict().items())
    return ''.join(f'{name} = {pprint.pformat(value, width=120, compact=True)}\n' for name, value in values)


def parse_config(text: str, source: str = 'config') -> Config:
    """Read a dumped config.

    Args:
        text: Assignments of literals and `dict(...)`.
        source: Name for the error message.

    Raises:
        CheckpointError: It contains anything else.
    """
    if len(text) > _MAX_TEXT:
        raise CheckpointError(f'{source} is not a config: it has {len(text):,} characters, at most {_MAX_TEXT:,} are '
                              'read.')
    values: dict[str, Any] = {}
    try:
        for statement in ast.parse(text).body:
            target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
            if not isinstance(target, ast.Name):
                raise ValueError(f'line {statement.lineno} is not an assignment')
            values[target.id] = _value(statement.value)  # type: ignore[attr-defined]
        return Config(values)
    except (SyntaxError, ValueError, KeyError, RecursionError, MemoryError) as e:  # MMEngine reserves some keys
        reason = ' '.join(str(e).split())[:200]
        raise CheckpointError(f'{source} is not a config of plain values: {reason}.') from e


def open_config(path: str | Path) -> Config:
    """Open a config file, or one of MMDetection's own as `mmdet::retinanet/retinanet_r18_fpn_1x_coco.py`.

    Raises:
        LeanError: There is no such file, or it cannot be read.
    """
    name = str(config_file(str(path)) if str(path).startswith(PREFIX) else path)
    if '::' not in name and not Path(name).is_file():
        raise LeanError(f'The config {name} does not exist.')
    try:
        return get_config(name) if '::' in name else Config.fromfile(name)
    except LeanError:
        raise
    except Exception as e:  # a config file is code and fails as it likes
        raise LeanError(f'The config {name} cannot be read: {type(e).__name__}: {e}') from e


def set_data_root(cfg: Config, root: str | Path, old: Collection[str] = ()) -> None:
    """Move a config's dataset: wherever `data_root` stands or begins a path, put another folder, in place.

    Args:
        cfg: The config.
        root: The new folder.
        old: The folders that it replaces; the config's `data_root` if empty.

    Raises:
        LeanError: There is none to replace.
    """
    replaced = tuple(old or filter(None, [cfg.get('data_root')]))
    if not replaced:
        raise LeanError('The config has no data_root, so --data-root cannot replace it.')
    new = str(root).rstrip('/') + '/'

    def moved(value: Any) -> Any:
        if isinstance(value, str) and value.startswith(replaced):
            return new + value[len(next(start for start in replaced if value.startswith(start))):].lstrip('/')
        if isinstance(value, dict):
            for key in value:
                value[key] = moved(value[key])
        elif isinstance(value, (list, tuple)):
            return type(value)(moved(item) for item in value)
        return value

    moved(cfg._cfg_dict)


def _value(node: ast.expr) -> Any:
    """The plain value an expression spells out; ValueError for anything that would have to be computed."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict' and (
            not node.args or (len(node.args) == 1 and isinstance(node.args[0], ast.Dict))):
        pairs: dict[Any, Any] = {}
        for argument in node.args:  # names that are no identifiers, such as modules of a pruned backbone
            pairs.update(_value(argument))
        for keyword in node.keywords:
            if keyword.arg is None and not isinstance(keyword.value, ast.Dict):
                raise ValueError(f'line {node.lineno} has {ast.unparse(keyword)[:60]!r}')
            pairs.update({keyword.arg: _value(keyword.value)} if keyword.arg else _value(keyword.value))
        return pairs
    if isinstance(node, ast.Dict) and all(isinstance(key, ast.Constant) for key in node.keys):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(item) for item in node.elts] if isinstance(node, ast.List) else tuple(
            _value(item) for item in node.elts)
    if isinstance(node, ast.Set) and all(isinstance(item, ast.Constant) for item in node.elts):
        return {_value(item) for item in node.elts}
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand)
        if isinstance(value, (int, float)):
            return -value
    if isinstance(node, ast.Name) and node.id in _NAMES:
        return _NAMES[node.id]
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, (str, int, float))):
        return node.value
    raise ValueError(f'line {node.lineno} has {ast.unparse(node)[:60]!r}')
