"""Training regularizers by name, for any training loop.

A regularizer is `reg(model) -> scalar`, weighted and ready to be added to the loss. `create_regularizer` makes one by
name; the classification engine and the MMDetection hook both go through it.
"""
from .base import (
    Regularizer,
    create_regularizer,
    list_regularizers,
    loss_terms,
    parse_regularizer,
    register_regularizer,
    set_progress,
)
from .conv_similarity import ConvSimilarity, conv_similarity
from .filters import FilterRegularizer
from .init import initialize_conv_similarity
from .orthogonality import BasisOrtho, KernelOrtho, Srip
from .schedule import Schedule, list_schedules
from .sparsity import L1, GroupLasso

__all__ = [
    'L1', 'BasisOrtho', 'ConvSimilarity', 'FilterRegularizer', 'GroupLasso', 'KernelOrtho', 'Regularizer', 'Schedule',
    'Srip', 'conv_similarity', 'create_regularizer', 'initialize_conv_similarity',
    'list_regularizers', 'list_schedules', 'loss_terms', 'parse_regularizer', 'register_regularizer', 'set_progress',
]
