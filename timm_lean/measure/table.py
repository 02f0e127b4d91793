"""Reports as a table for people, and as JSON."""
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from .report import ModelReport

__all__ = ['format_table', 'human_bytes', 'human_count', 'to_json']


def format_table(reports: Sequence[ModelReport]) -> str:
    """Reports as aligned columns; from the second on with the ratio to the first."""
    first = reports[0]
    columns: list[tuple[str, list[str]]] = [('model', [r.name for r in reports])]

    def add(title: str, values: list[float | None], show: Any, ratio: bool = True) -> None:
        if all(v is None for v in values):
            return
        cells = []
        for v in values:
            text = '-' if v is None else show(v)
            if v is not None and ratio and len(values) > 1 and values[0]:
                text += f' ({v / values[0]:.2f}x)'
            cells.append(text)
        columns.append((title, cells))

    add('params', [r.params for r in reports], lambda v: f'{v:,}')
    add(f'MACs @{first.img_size}', [r.macs for r in reports], human_count)
    add('file', [r.bytes for r in reports], human_bytes)
    add('latency', [r.latency_ms for r in reports], lambda v: f'{v:.2f} ms')
    add('peak memory', [r.peak_memory for r in reports], human_bytes)
    add('top-1', [r.top1 for r in reports], lambda v: f'{v:.2f} %', ratio=False)
    widths = [max(len(title), *map(len, cells)) for title, cells in columns]
    lines = ['  '.join(title.ljust(w) for (title, _), w in zip(columns, widths, strict=True))]
    for i in range(len(reports)):
        lines.append('  '.join(cells[i].ljust(w) for (_, cells), w in zip(columns, widths, strict=True)))
    if any(r.latency_ms is not None for r in reports):
        spreads = ', '.join(f'±{r.latency_spread_ms:.2f}' for r in reports)
        lines.append(f'latency: batch 1 on {first.device}, {torch.get_num_threads()} threads, median of repeats '
                     f'({spreads} ms half interquartile range)')
    return '\n'.join(line.rstrip() for line in lines)


def to_json(reports: Sequence[ModelReport]) -> str:
    """Reports as a JSON array."""
    return json.dumps([asdict(r) for r in reports], indent=2)


def human_count(value: float) -> str:
    """1234567 -> '1.23 M'."""
    for unit, factor in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if value >= factor:
            return f'{value / factor:.2f} {unit}'
    return f'{value:.0f}'


def human_bytes(value: float) -> str:
    """1234567 -> '1.2 MB'."""
    for unit, factor in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if value >= factor:
            return f'{value / factor:.1f} {unit}'
    return f'{value:.0f} B'
