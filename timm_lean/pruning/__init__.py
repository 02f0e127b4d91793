"""Eigenvalue pruning of kernels and channels.

What needs torch-pruning (`pip install 'timm-lean[prune]'`) is imported when it is first asked for.
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .kernels import KernelPruner, prune_kernels
from .report import PruneReport, plot_report
from .resize import resize
from .schedule import PruneSchedule, list_prune_schedules
from .spectral import ALL_CRITERIA, CRITERIA, all_scores, kernel_scores, threshold_for

if TYPE_CHECKING:
    from .analysis import analyze_criteria
    from .channels import prune_channels
    from .compaction import compact
    from .importance import SpectralImportance

__all__ = [
    'ALL_CRITERIA', 'CRITERIA', 'KernelPruner', 'PruneReport', 'PruneSchedule', 'SpectralImportance', 'all_scores',
    'analyze_criteria', 'compact', 'kernel_scores', 'list_prune_schedules', 'plot_report', 'prune_channels',
    'prune_kernels', 'resize', 'threshold_for',
]

_LAZY = {
    'SpectralImportance': 'importance', 'analyze_criteria': 'analysis', 'compact': 'compaction',
    'prune_channels': 'channels'}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f'.{_LAZY[name]}', __name__), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

