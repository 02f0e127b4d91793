"""The filter banks of a model, and the base class of the regularizers that act on them.

A filter bank is a set of convolution filters that exists once: an `nn.Conv2d`, or a `FilterBasis` however many layers
share it.
"""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
import torch.nn as nn

from timm_lean.errors import LeanError
from timm_lean.layers import FilterBasis

from .base import Regularizer

__all__ = ['FilterBank', 'FilterRegularizer', 'check_finite', 'find_filter_banks', 'total']

Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class FilterBank:
    """The convolution filters of one module.

    The module is kept, not its tensor: `.to()`, `to_empty()` and pruning may replace the tensor.

    Attributes:
        name: The module's (first) name in the model.
        module: What holds the filters.
    """
    name: str
    module: nn.Conv2d | FilterBasis

    @property
    def weight(self) -> torch.Tensor:
        """The filters as they are now, `[N, C / groups, kh, kw]`."""
        return self.module.weight

    @property
    def groups(self) -> int:
        return self.module.groups

    @property
    def filters_per_group(self) -> int:
        """Number of filters that see the same input."""
        return len(self.weight) // self.groups


def find_filter_banks(
        model: nn.Module,
        include: Patterns = None,
        exclude: Patterns = None,
        skip_stem: bool = False,
        skip_1x1: bool = False,
        user: str = 'This operation',
        exclude_name: str = 'exclude',
) -> list[FilterBank]:
    """List a model's filter banks, each once, in module order.

    Args:
        model: Any model.
        include: Keep only the banks whose name matches one of these shell patterns (`layer1.*`); several as a list or
            joined by `|`.
        exclude: Drop the banks whose name matches one of these.
        skip_stem: Drop the model's first convolution, which sees the image.
        skip_1x1: Drop 1 x 1 kernels.
        user: Who asks, for the error messages.
        exclude_name: What the one who asks calls `exclude`.

    Raises:
        LeanError: The model has no convolution, a pattern matches none, or nothing is left.
    """
    banks: list[FilterBank] = []
    seen: set[int] = set()
    for name, module in model.named_modules():
        # Two modules may be tied by one parameter; its filters exist once all the same.
        if isinstance(module, (nn.Conv2d, FilterBasis)) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            banks.append(FilterBank(name, module))
    if not banks:
        raise LeanError(f'{user} acts on 2-d convolutions, and {type(model).__name__} has none.')
    names = [bank.name for bank in banks]
    wanted = _matches(include, names, user, 'include')
    unwanted = _matches(exclude, names, user, exclude_name)
    chosen = [
        bank for i, bank in enumerate(banks)
        if (include is None or bank.name in wanted) and bank.name not in unwanted
        and not (skip_stem and i == 0) and not (skip_1x1 and bank.weight.shape[2:].numel() == 1)]
    if not chosen:
        raise LeanError(f'{user}: include, exclude, skip_stem and skip_1x1 leave none of the {len(banks)} convolutions '
                        f'({_some(names)}).')
    return chosen


def _matches(patterns: Patterns, names: list[str], user: str, option: str) -> set[str]:
    if patterns is None:
        return set()
    if isinstance(patterns, str):
        patterns = patterns.split('|')
    matched: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise LeanError(f'{user}: {option}={pattern!r} matches no convolution. Names are like {_some(names)}.')
        matched.update(hits)
    return matched


def _some(names: list[str]) -> str:
    step = max(len(names) // 4, 1)
    return ', '.join(names[::step][:5])


def check_finite(banks: Iterable[FilterBank], user: str) -> None:
    """Raise a LeanError that names the first bank with a NaN or infinite weight. Costs a device synchronization."""
    for bank in banks:
        if not bank.weight.is_meta and not bool(torch.isfinite(bank.weight).all()):
            raise LeanError(f'{user}: the weights of {bank.name!r} are not all finite (NaN or infinity).')


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
