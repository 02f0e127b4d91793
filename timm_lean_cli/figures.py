"""What a network has and costs before and after a command, in one table."""
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ['Figures', 'figures_table']


@dataclass
class Figures:
    """What a network is and costs at one point; `top1` and `ap` only with data."""
    params: int
    nonzero: int
    live_kernels: int
    macs: int
    bytes: int | None
    top1: float | None = None
    ap: float | None = None

    @classmethod
    def of(cls, model: Any, macs: int, path: Path) -> 'Figures':
        """Count what a network has; `path` is its file, if it has one."""
        import torch.nn as nn

        from timm_lean.measure import count_params
        from timm_lean.pruning.report import live_kernels
        return cls(
            count_params(model), sum(int((p != 0).sum()) for p in model.parameters()),
            sum(int(live_kernels(m.weight).sum()) for m in model.modules() if isinstance(m, nn.Conv2d)),
            macs, path.stat().st_size if path.is_file() else None)


def figures_table(columns: dict[str, Figures]) -> str:
    """Points beside each other, a row for each figure."""
    from timm_lean.measure import human_bytes, human_count
    shown: dict[str, Callable[[Figures], str]] = {
        'parameters': lambda f: f'{f.params:,}',
        'non-zero': lambda f: f'{f.nonzero:,}',
        'live kernels': lambda f: f'{f.live_kernels:,}',
        'MACs': lambda f: human_count(f.macs),
        'file': lambda f: '-' if f.bytes is None else human_bytes(f.bytes),
        'top-1': lambda f: '' if f.top1 is None else f'{f.top1:.2f} %',
        'AP': lambda f: '' if f.ap is None else f'{f.ap:.4f}',
    }
    rows = [f'{name:14}' + ''.join(f'{show(f):>16}' for f in columns.values()) for name, show in shown.items()]
    return '\n'.join([f'{"":14}' + ''.join(f'{title:>16}' for title in columns), *filter(_has_values, rows)])


def _has_values(row: str) -> bool:
    return bool(row[14:].strip())
