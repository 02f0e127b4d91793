"""Eigenvalue pruning of kernels and channels."""
from .analysis import analyze_criteria
from .channels import prune_channels
from .compaction import compact
from .importance import SpectralImportance
from .kernels import KernelPruner, prune_kernels
from .report import KernelReport, plot_report
from .resize import resize
from .schedule import PruneSchedule, list_prune_schedules
from .spectral import ALL_CRITERIA, CRITERIA, all_scores, kernel_scores, threshold_for

__all__ = [
    'ALL_CRITERIA', 'CRITERIA', 'KernelPruner', 'KernelReport', 'PruneSchedule', 'SpectralImportance', 'all_scores',
    'analyze_criteria', 'compact', 'kernel_scores', 'list_prune_schedules', 'plot_report', 'prune_channels',
    'prune_kernels', 'resize', 'threshold_for',
]
