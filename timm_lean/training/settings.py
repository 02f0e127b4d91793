"""What a setting may be: one rule for each, beside its default, used by flags, YAML files and Python alike."""
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from typing import Any

from timm_lean.errors import LeanError

__all__ = ['check_setting', 'check_settings', 'from_mapping', 'rule', 'setting']

_MAX_TEXT = 4096  # the longest path that Linux takes


@dataclass(frozen=True)
class _Rule:
    """Bounds of a number, or of each number in a list, and the choices of a text."""
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()

    def allows(self, value: float) -> bool:
        return (math.isfinite(value)
                and (self.least is None or value >= self.least) and (self.above is None or value > self.above)
                and (self.most is None or value <= self.most) and (self.below is None or value < self.below))

    def __str__(self) -> str:
        bounds = (('of at least', self.least), ('above', self.above), ('at most', self.most), ('below', self.below))
        return ' and '.join(f'{word} {bound:,}' for word, bound in bounds if bound is not None)


def rule(**bounds: Any) -> dict[str, Any]:
    """Metadata of a dataclass field: `least`, `above`, `most`, `below` for numbers, `choices` for texts."""
    return {'rule': _Rule(**bounds)}


def setting(default: Any, **bounds: Any) -> Any:
    """A dataclass field with a default and a `rule`."""
    return field(default=default, metadata=rule(**bounds))


def check_settings(config: Any) -> None:
    """Hold every field of a config against its annotation and rule; numbers written as text become numbers.

    Raises:
        LeanError: The first value that does not fit; the message says what would.
    """
    for name in (f.name for f in fields(config)):
        setattr(config, name, check_setting(type(config), name, getattr(config, name)))


def check_setting(config: type, name: str, value: Any) -> Any:
    """One value of a config class, checked as `check_settings` does; returns the value to use."""
    f: Field[Any] = next(f for f in fields(config) if f.name == name)
    kind = typing.get_type_hints(config)[name]
    return _convert(name + _of(config), value, kind, f.metadata.get('rule') or _Rule())


def from_mapping(config: type, values: Mapping[str, Any]) -> Any:
    """A config from values by name.

    Raises:
        LeanError: A name that it does not have, or a value that does not fit.
    """
    known = [f.name for f in fields(config)]
    for name in values:
        if name not in known:
            raise LeanError(f'Unknown setting {repr(name)[:100]}{_of(config)}. Known: {", ".join(known)}.')
    return config(**values)


def _of(config: type) -> str:
    """What a nested config is called in messages, ' of NAME'."""
    part = getattr(config, 'PART', '')
    return f' of {part}' if part else ''


def _convert(name: str, value: Any, kind: Any, limits: _Rule) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):  # of one type and None
        if value is None:
            return None
        kind, = (a for a in arguments if a is not type(None))
        return _convert(name, value, kind, limits)
    if origin is list:
        values = [value] if isinstance(value, (str, int, float)) else value
        if not isinstance(values, (list, tuple)):
            raise _refused(name, 'a list', value)
        return [_convert(name, v, arguments[0], limits) for v in values]
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise _refused(name, 'a mapping of names to values', value)
        return dict(value)
    if is_dataclass(kind):
        if isinstance(value, Mapping):
            return from_mapping(typing.cast(type, kind), value)
        if not isinstance(value, typing.cast(type, kind)):
            raise _refused(name, 'a mapping of settings', value)
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise _refused(name, 'true or false', value)
        return value
    if kind is str:
        return _text(name, value, limits)
    return _number(name, value, kind, limits)


def _text(name: str, value: Any, limits: _Rule) -> str:
    if not isinstance(value, str) or (limits.choices and value not in limits.choices):
        raise _refused(name, f'one of {", ".join(map(repr, limits.choices))}' if limits.choices else 'a text', value)
    if len(value) > _MAX_TEXT or not value.isprintable():
        raise _refused(name, f'printable and at most {_MAX_TEXT} characters long', value)
    return value


def _number(name: str, value: Any, kind: type, limits: _Rule) -> Any:
    what = f'a {"whole " if kind is int else ""}number {limits}'.rstrip()
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 5e-4 as text
        try:
            value = float(value)
        except ValueError:
            raise _refused(name, what, value) from None
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise _refused(name, what, value)
    if isinstance(value, float) and not math.isfinite(value):
        raise _refused(name, what.replace('a number', 'a finite number'), value)
    if (isinstance(value, int) and abs(value) > 2 ** 63) or not limits.allows(value):
        raise _refused(name, what, value)
    return kind(value)


def _refused(name: str, expected: str, value: Any) -> LeanError:
    return LeanError(f'{name} must be {expected}, got {repr(value)[:100]}.')
