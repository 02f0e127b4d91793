"""What a user wishes for: `params=0.5`, `file=500kB`, `latency=0.7`."""
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm_lean.errors import LeanError
from timm_lean.measure import human_bytes, human_count

from .sizes import QUANTITIES, Sizes

__all__ = ['Target', 'TargetError', 'TargetSpec', 'parse_targets']

TargetSpec = str | Sequence[str] | Mapping[str, 'float | str']
_COUNTS = {'k': 1e3, 'M': 1e6, 'G': 1e9}
_UNITS: dict[str, dict[str, float]] = {
    'params': _COUNTS,
    'macs': _COUNTS,
    'file': {'B': 1., 'kB': 1e3, 'MB': 1e6, 'GB': 1e9, 'KiB': 2. ** 10, 'MiB': 2. ** 20, 'GiB': 2. ** 30},
    'latency': {'us': 1e-3, 'ms': 1., 's': 1e3},
}


class TargetError(LeanError):
    """No network meets the targets with the accuracy that was asked for; `nearest` says which comes nearest."""

    def __init__(self, message: str, nearest: str = ''):
        super().__init__(message)
        self.nearest = nearest


@dataclass(frozen=True)
class Target:
    """At most so much of one quantity.

    Attributes:
        quantity: One of 'params', 'macs', 'file' and 'latency'.
        value: A share of the original's, in (0, 1), or an absolute number: parameters, MACs, bytes, milliseconds.
        is_share: Which of the two.
    """
    quantity: str
    value: float
    is_share: bool

    def limit(self, original: Sizes) -> float:
        """The largest value that meets it."""
        return self.value * original[self.quantity] if self.is_share else self.value

    def __str__(self) -> str:
        if self.is_share:
            return f'{self.quantity}={self.value:g}'
        return f'{self.quantity}={show(self.quantity, self.value)}'


def show(quantity: str, value: float) -> str:
    """A value with its unit."""
    if quantity == 'file':
        return human_bytes(round(value))
    return f'{value:.3g} ms' if quantity == 'latency' else human_count(round(value))


def parse_targets(wanted: TargetSpec) -> tuple[Target, ...]:
    """Read `'params=0.5'`, `['params=0.5', 'latency=5ms']` or `{'params': 0.5, 'file': '500kB'}`.

    Raises:
        LeanError: An unknown quantity or unit, a value that is no share and has no unit, one quantity twice, nothing.
    """
    if isinstance(wanted, Mapping):
        pairs: list[tuple[str, Any]] = list(wanted.items())
    else:
        texts = [wanted] if isinstance(wanted, str) else list(wanted)
        for text in texts:
            if not isinstance(text, str) or '=' not in text:
                raise LeanError(f'The target {str(text)[:80]!r} is not of the form QUANTITY=VALUE, such as params=0.5 '
                                f'or file=500kB. Quantities: {", ".join(QUANTITIES)}.')
        pairs = [(text.partition('=')[0].strip(), text.partition('=')[2].strip()) for text in texts]
    if not pairs:
        raise LeanError('Compression needs a target, such as params=0.5.')
    targets = tuple(_parse(str(name), value) for name, value in pairs)
    names = [target.quantity for target in targets]
    for name in names:
        if names.count(name) > 1:
            raise LeanError(f'The target {name} is given {names.count(name)} times '
                            f'({", ".join(str(t) for t in targets if t.quantity == name)}): give it once.')
    return targets


def _parse(name: str, value: Any) -> Target:
    if name not in QUANTITIES:
        raise LeanError(f'Unknown target {name[:40]!r}. There are: {", ".join(QUANTITIES)}.')
    units = _UNITS[name]
    match = re.fullmatch(r'([0-9.]+(?:e[+-]?[0-9]+)?)\s*([A-Za-z]*)', str(value))
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    unit = match[2] if match else ''
    if not match or not math.isfinite(number) or number <= 0 or (unit and unit not in units):
        raise LeanError(f'The target {name}={str(value)[:40]} must be a share of the original, in (0, 1), or a number '
                        f'with a unit: {", ".join(units)}.')
    if unit:
        return Target(name, number * units[unit], is_share=False)
    if number >= 1:
        raise LeanError(f'The target {name}={str(value)[:40]} is not below 1: a share of the original lies in (0, 1); '
                        f'an absolute value needs a unit: {", ".join(units)}.')
    return Target(name, number, is_share=True)
