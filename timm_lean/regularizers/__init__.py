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
)
from .orthogonality import BasisOrtho

__all__ = [
    'BasisOrtho', 'Regularizer', 'create_regularizer', 'list_regularizers', 'loss_terms', 'parse_regularizer',
    'register_regularizer',
]
