"""What a mix of techniques promises, from what each of them did alone.

Sizes of techniques multiply (half the channels, then half of what is left by sharing), losses add up.
"""
import itertools
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

__all__ = ['Curve', 'Mix', 'all_mixes', 'neighbours', 'predict_factor', 'predict_loss']

Mix = tuple[tuple[str, float], ...]  # technique and amount, the largest amount 1
_LEAST_LOSS = 0.02  # points; a technique that cost nothing so far is not free for ever


class Curve:
    """A function of an amount by its points, straight between them; beyond the last, as `beyond` says."""

    def __init__(self, points: Mapping[float, float], quadratic: bool = False):
        self._points = sorted(points.items())
        self._quadratic = quadratic

    def __call__(self, amount: float) -> float:
        xs = [x for x, _ in self._points]
        i = bisect_left(xs, amount)
        if i == len(xs):
            x, y = self._points[-1]
            return max(y, _LEAST_LOSS) * (amount / x) ** 2 if self._quadratic and x > 0 else y
        if i == 0:
            return self._points[0][1]
        (x0, y0), (x1, y1) = self._points[i - 1:i + 1]
        return y0 + (y1 - y0) * (amount - x0) / (x1 - x0)


def predict_factor(mix: Mix, shares: Mapping[str, Sequence[Curve]], limits: Sequence[float]) -> float | None:
    """How far a mix has to go so that no share of a quantity is above its limit; None if it cannot.

    Args:
        mix: The mix.
        shares: For each technique a curve per quantity: what it leaves of it.
        limits: The largest share of each quantity.
    """
    def met(factor: float) -> bool:
        for index, limit in enumerate(limits):
            share = 1.
            for name, amount in mix:
                share *= shares[name][index](amount * factor)
            if share > limit:
                return False
        return True

    if not met(1.):
        return None
    low, high = 0., 1.
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if met(middle) else (middle, high)
    return high


def predict_loss(mix: Mix, factor: float, losses: Mapping[str, Curve]) -> float:
    """Points that a mix costs."""
    return sum(losses[name](amount * factor) for name, amount in mix)


def all_mixes(names: Sequence[str], parts: int) -> Iterator[Mix]:
    """All mixes of two or more techniques, with amounts in multiples of 1 / parts."""
    for amounts in itertools.product(range(parts + 1), repeat=len(names)):
        if max(amounts, default=0) == parts and sum(a > 0 for a in amounts) > 1:
            yield tuple((name, a / parts) for name, a in zip(names, amounts, strict=True) if a)


def neighbours(mix: Mix, names: Sequence[str], step: float) -> Iterator[Mix]:
    """Mixes that differ by a step in one technique."""
    amounts = dict(mix)
    for name in names:
        for sign in (-1, 1):
            changed = {**amounts, name: round(amounts.get(name, 0.) + sign * step, 4)}
            changed = {n: changed[n] for n in names if changed.get(n, 0.) > 0}
            if changed:
                most = max(changed.values())
                yield tuple((n, round(a / most, 4)) for n, a in changed.items())
