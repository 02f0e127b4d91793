"""Time of several pieces of work, taken in turn, so that a change of the machine's load falls on all of them alike."""
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ['Timing', 'hardware', 'synchronize', 'time_in_turn']


@dataclass
class Timing:
    """Seconds of the rounds of one piece of work."""
    seconds: list[float]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Seconds below which a quarter and three quarters of the rounds lie."""
        if len(self.seconds) == 1:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method='inclusive')
        return low, high

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, in seconds."""
        low, high = self.quartiles
        return (high - low) / 2

    def ratios(self, anchor: 'Timing') -> list[float]:
        """This time divided by that of an anchor in the same round, for each round."""
        return [a / b for a, b in zip(self.seconds, anchor.seconds, strict=True)]

    def ratio(self, anchor: 'Timing') -> float:
        """Median of `ratios`; below 1 is faster than the anchor."""
        return statistics.median(self.ratios(anchor))


def time_in_turn(
        works: Mapping[str, Callable[[], Any]],
        device: torch.device,
        repeats: int,
        warmup: int = 3,
        before: Callable[[], Any] | None = None,
) -> dict[str, Timing]:
    """Time pieces of work, one of each per round.

    Args:
        works: What to time, by name.
        device: Where it runs; a GPU is waited for.
        repeats: Timed rounds.
        warmup: Untimed rounds before.
        before: Runs, untimed, ahead of each piece of work.

    Returns:
        The times by name, in the order of `works`.
    """
    timings = {name: Timing([]) for name in works}
    for round_ in range(-warmup, repeats):
        for name, work in works.items():
            if before is not None:
                before()
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            if round_ >= 0:
                timings[name].seconds.append(time.perf_counter() - start)
    return timings


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def hardware(device: torch.device) -> str:
    """What the times were measured on, in words."""
    if device.type == 'cuda':
        return f'{torch.cuda.get_device_name(device)}, torch {torch.__version__}'
    try:
        with open('/proc/cpuinfo') as f:
            cpu = next(line.split(':', 1)[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f'{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}'
