"""Eigenvalue pruning of kernels and channels."""
from .analysis import analyze_criteria
from .blocks import rank_blocks, remove_blocks
from .channels import prune_channels
from .compaction import compact
from .importance import SpectralImportance
from .kernels import KernelPruner, prune_kernels
from .report import KernelReport
from .resize import resize
from .schedule import PruneSchedule, list_prune_schedules
from .spectral import ALL_CRITERIA, CRITERIA, all_scores, kernel_scores, threshold_for
from .zeros import ZeroKeeper, keep_zeros, kernel_report

__all__ = [
    'ALL_CRITERIA', 'CRITERIA', 'KernelPruner', 'KernelReport', 'PruneSchedule', 'SpectralImportance', 'ZeroKeeper',
    'all_scores', 'analyze_criteria', 'compact', 'keep_zeros', 'kernel_report', 'kernel_scores', 'list_prune_schedules',
    'prune_channels', 'prune_kernels', 'rank_blocks', 'remove_blocks', 'resize', 'threshold_for',
]
