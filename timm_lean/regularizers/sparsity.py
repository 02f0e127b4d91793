"""Regularizers that make convolution weights sparse.

`l1`: `sum |w|` over the convolution weights, single weights go to zero. Eigenvalue-based pruning trains with it
- https://arxiv.org/abs/2102.02804

`group_lasso`: `sum_filters sqrt(d) ||w||_2`, d the weights of the filter, whole output filters go to zero. Paper:
`Model Selection and Estimation in Regression with Grouped Variables`, Yuan & Lin 2006; for filters Wen et al. 2016
- https://arxiv.org/abs/1608.03665
"""
import math

import torch

from timm_lean.layers.filter_banks import FilterBank

from .base import register_regularizer
from .filters import FilterRegularizer, total

__all__ = ['L1', 'GroupLasso']

# Below this norm a filter counts as zero and its penalty turns from a cone into a parabola.
_SMOOTH = 1e-6


@register_regularizer
class L1(FilterRegularizer):
    """Sum of the absolute values of the convolution weights. Its gradient at a weight of 0 is 0."""
    name = 'l1'

    def compute(self, layers: list[FilterBank]) -> torch.Tensor:
        return total([torch.linalg.vector_norm(_fp32(bank.weight), 1) for bank in layers])


@register_regularizer
class GroupLasso(FilterRegularizer):
    """Sum over output filters of their Euclidean norm, times the square root of their number of weights.

    The norm is smoothed by 1e-6 around 0, so that dead filters have gradient 0 and not NaN.
    """
    name = 'group_lasso'

    def compute(self, layers: list[FilterBank]) -> torch.Tensor:
        terms = []
        for bank in layers:
            rows = _fp32(bank.weight).flatten(1)
            norms = torch.linalg.vector_norm(rows, dim=1)
            smooth = torch.hypot(norms, norms.new_tensor(_SMOOTH)) - _SMOOTH
            terms.append(math.sqrt(rows.shape[1]) * smooth.sum())
        return total(terms)


def _fp32(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()
