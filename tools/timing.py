"""Times of several forms of one thing, taken in turn, and their ratios."""
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass
class Timing:
    """Seconds of the repeats of one form."""
    name: str
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2


def interleave(
        forms: dict[str, Callable[[], Any]], repeats: int, device: torch.device, warmup: int = 3,
        before: Callable[[], Any] | None = None,
) -> list[Timing]:
    """Time functions in turn, `repeats` rounds after a warm-up; `before` runs, untimed, ahead of each."""
    timings = {name: Timing(name, []) for name in forms}
    for round_ in range(-warmup, repeats):
        for name, function in forms.items():
            if before is not None:
                before()
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if round_ >= 0:
                timings[name].seconds.append(time.perf_counter() - start)
    return list(timings.values())


def synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def paired_ratio(timing: Timing, anchor: Timing) -> float:
    """Median over the rounds of one form's time divided by the anchor's in the same round."""
    return statistics.median(a / b for a, b in zip(timing.seconds, anchor.seconds, strict=True))


def hardware(device: torch.device) -> str:
    if device.type == 'cuda':
        return f'{torch.cuda.get_device_name(device)}, torch {torch.__version__}'
    try:
        with open('/proc/cpuinfo') as f:
            cpu = next(line.split(':', 1)[1].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    return f'{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}'


def print_timings(title: str, timings: Sequence[Timing], anchors: Sequence[str]) -> list[dict[str, Any]]:
    """Print one table, with the ratio to each anchor; returns its rows."""
    by_name = {t.name: t for t in timings}
    rows = []
    print(f'\n{title}')
    print(f'{"":16}{"median":>12}{"spread":>12}' + ''.join(f'{"vs " + a:>16}' for a in anchors))
    for t in timings:
        ratios = {a: paired_ratio(t, by_name[a]) for a in anchors}
        print(f'{t.name:16}{1000 * t.median:>9.2f} ms{1000 * t.spread:>9.2f} ms'
              + ''.join(f'{r:>15.3f}x' for r in ratios.values()))
        rows.append({'table': title, 'form': t.name, 'ms': 1000 * t.median, 'spread_ms': 1000 * t.spread, 'vs': ratios})
    return rows


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Most bytes held at once beyond those held before."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        work()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
