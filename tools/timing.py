"""Tables of times and of their ratios to anchors of the same run."""
from collections.abc import Mapping, Sequence
from typing import Any

from timm_lean.measure.timing import Timing


def print_timings(title: str, timings: Mapping[str, Timing], anchors: Sequence[str]) -> list[dict[str, Any]]:
    """Print one table, with the ratio to each anchor; returns its rows."""
    rows = []
    print(f'\n{title}')
    print(f'{"":16}{"median":>12}{"spread":>12}' + ''.join(f'{"vs " + a:>16}' for a in anchors))
    for name, timing in timings.items():
        ratios = {a: timing.ratio(timings[a]) for a in anchors}
        print(f'{name:16}{1000 * timing.median:>9.2f} ms{1000 * timing.spread:>9.2f} ms'
              + ''.join(f'{r:>15.3f}x' for r in ratios.values()))
        rows.append({
            'table': title, 'form': name, 'ms': 1000 * timing.median, 'spread_ms': 1000 * timing.spread, 'vs': ratios})
    return rows
