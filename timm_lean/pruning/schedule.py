"""When a pruner acts and how far it goes, a function of training progress alone.

The cubic shape is that of `To prune, or not to prune`, Zhu & Gupta 2017 - https://arxiv.org/abs/1710.01878, equation 1.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

from timm_lean.errors import LeanError

__all__ = ['PruneSchedule', 'list_prune_schedules']

# The amount pruned when the part t in [0, 1] of the updates is done, for a final amount a.
_SHAPES: dict[str, Callable[[float, float], float]] = {
    'one_shot': lambda t, a: a,
    'linear': lambda t, a: a * t,
    'cubic': lambda t, a: a * (1 - (1 - t) ** 3),
    'exponential': lambda t, a: 1 - (1 - a) ** t,  # every update takes the same share of what is left
}


def list_prune_schedules() -> list[str]:
    """The names of the schedules."""
    return list(_SHAPES)


@dataclass(frozen=True)
class PruneSchedule:
    """At which progress masks are renewed, and to which amount.

    Progress, `begin`, `end` and `every` are in one unit of the user's choice: epochs (fractions count) or steps.

    Args:
        shape: One of `list_prune_schedules()`.
        begin: Progress of the first update.
        end: Progress by which the final amount is reached; `one_shot` acts at `begin` and has none.
        every: Progress between two updates.
    """
    shape: str = 'one_shot'
    begin: float = 0.0
    end: float | None = None
    every: float = 1.0

    def __post_init__(self) -> None:
        if self.shape not in _SHAPES:
            raise LeanError(f'Unknown pruning schedule {self.shape!r}. Known: {", ".join(_SHAPES)}.')
        if not 0 <= self.begin < math.inf:
            raise LeanError(f'A pruning schedule must begin at 0 or later, got begin={self.begin!r}.')
        if not 0 < self.every < math.inf:
            raise LeanError(f'A pruning schedule needs a positive distance between updates, got every={self.every!r}.')
        if self.shape == 'one_shot':
            if self.end is not None and self.end != self.begin:
                others = ', '.join(name for name in _SHAPES if name != 'one_shot')
                raise LeanError(f"The schedule 'one_shot' acts at begin={self.begin:g} only; leave out "
                                f'end={self.end:g} or choose one of {others}.')
        elif self.end is None or not self.begin < self.end < math.inf:
            raise LeanError(f'The schedule {self.shape!r} needs an end after its begin={self.begin:g}, '
                            f'got end={self.end!r}.')

    @property
    def updates(self) -> int:
        """How often the masks are renewed in all."""
        if self.end is None or self.shape == 'one_shot':
            return 1
        return max(1, math.ceil((self.end - self.begin) / self.every - 1e-9))

    def due(self, progress: float) -> int:
        """How many updates should have happened at this progress."""
        if progress < self.begin:
            return 0
        return min(self.updates, 1 + math.floor((progress - self.begin) / self.every + 1e-9))

    def amount(self, update: int, final: float) -> float:
        """The amount after this many updates on the way to `final`."""
        return _SHAPES[self.shape](update / self.updates, final)
