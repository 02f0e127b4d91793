"""The weight of a regularizer over training, a function of progress alone.

With no state of its own, a schedule is resumed by telling it the progress of the restored step.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

from timm_lean.errors import LeanError

__all__ = ['Schedule', 'list_schedules']

# Of t in [0, 1], the part of the schedule's own span that is over.
_SHAPES: dict[str, Callable[[float], float]] = {
    'constant': lambda t: 1.0,
    'cosine': lambda t: (1 + math.cos(math.pi * t)) / 2,
    'linear': lambda t: 1 - t,
    'warmup_cosine': lambda t: (1 - math.cos(math.pi * t)) / 2,
    'warmup_linear': lambda t: t,
}
WARMUP_SPAN = 0.1


def list_schedules() -> list[str]:
    """The names `Schedule.parse` knows, sorted."""
    return sorted(_SHAPES)


@dataclass(frozen=True)
class Schedule:
    """The factor of a regularizer's weight against training progress.

    `linear` and `cosine` decay from 1 to 0, `warmup_linear` and `warmup_cosine` rise from 0 to 1; then they stay there.

    Args:
        shape: One of `list_schedules()`.
        span: Fraction of training in (0, 1] after which the schedule has arrived.
    """
    shape: str = 'constant'
    span: float = 1.0

    @classmethod
    def parse(cls, text: str) -> 'Schedule':
        """Read `SHAPE` or `SHAPE@SPAN`, e.g. `cosine` or `warmup_linear@0.2`.

        The span is all of training for a decay and its first tenth for a warm-up if not given.

        Raises:
            LeanError: An unknown shape or a span outside (0, 1].
        """
        shape, sep, number = text.partition('@')
        if shape not in _SHAPES:
            raise LeanError(f'Unknown schedule {shape!r}. Known: {", ".join(list_schedules())}; '
                            'SHAPE@SPAN ends it early, e.g. cosine@0.5.')
        span = WARMUP_SPAN if shape.startswith('warmup') else 1.0
        if sep:
            try:
                span = float(number)
            except ValueError:
                span = math.nan
            if not 0 < span <= 1:
                raise LeanError(f'The span of schedule {text!r} must be a number above 0 and at most 1.')
        return cls(shape, span)

    def factor(self, progress: float) -> float:
        """The factor at a progress in [0, 1]."""
        return _SHAPES[self.shape](min(progress / self.span, 1.0))

    def __str__(self) -> str:
        return self.shape if self.shape == 'constant' else f'{self.shape}@{self.span:g}'
