"""The base class of the regularizers that act on filter banks."""
from collections.abc import Sequence

import torch
import torch.nn as nn

from timm_lean.errors import LeanError
from timm_lean.layers.filter_banks import FilterBank, check_finite, find_filter_banks
from timm_lean.layers.patterns import Patterns

from .base import Regularizer

__all__ = ['FilterRegularizer', 'total']


def total(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of scalars that may live on different devices, on the device of the first."""
    result = terms[0]
    for term in terms[1:]:
        result = result + term.to(result.device)
    return result


class FilterRegularizer(Regularizer):
    """A regularizer that acts on filter banks.

    Weights are checked for NaN at a model's first use only; later checks would stall the GPU in every step.

    Args:
        weight: Factor of the penalty in the loss.
        include: Act only on banks whose name matches one of these shell patterns; a list, or joined by `|`.
        exclude: Do not act on banks whose name matches one of these.
        skip_stem: Leave out the model's first convolution.
        skip_1x1: Leave out 1 x 1 kernels.
    """

    def __init__(
            self,
            weight: float = 1.0,
            include: Patterns = None,
            exclude: Patterns = None,
            skip_stem: bool = False,
            skip_1x1: bool = False,
    ):
        super().__init__(weight)
        self.include = include
        self.exclude = exclude
        self.skip_stem = self._flag('skip_stem', skip_stem)
        self.skip_1x1 = self._flag('skip_1x1', skip_1x1)

    def _flag(self, option: str, value: bool) -> bool:
        if not isinstance(value, bool):
            raise LeanError(f'{option} of {self.name!r} must be true or false, got {value!r}.')
        return value

    def find(self, model: nn.Module) -> list[FilterBank]:
        user = f'Regularizer {self.name!r}'
        banks = find_filter_banks(model, self.include, self.exclude, self.skip_stem, self.skip_1x1, user)
        check_finite(banks, user)
        return banks
