"""Entropy-based depth: how deep a network is worth for a dataset, and the shallower, wider network.

Source: https://arxiv.org/abs/2106.14190 (Gowdra et al. 2021). The map from entropy to depth is this project's own.
"""
from .bound import depth_bound, list_rules, register_rule
from .entropy import EntropyResult, dataset_entropy
from .family import Budget, bounded_model, list_families

__all__ = [
    'Budget', 'EntropyResult', 'bounded_model', 'dataset_entropy', 'depth_bound', 'list_families',
    'list_rules', 'register_rule',
]
