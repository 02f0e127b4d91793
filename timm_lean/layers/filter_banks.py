"""The filter banks of a model: what regularizers and pruning act on.

A filter bank is a set of convolution filters that exists once: an `nn.Conv2d`, or a `FilterBasis` however many layers
share it. Linear layers have none, shared or not.
"""
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn

from timm_lean.errors import LeanError

from .filter_basis import FilterBasis
from .patterns import Patterns, match_names, some_names
from .shared_basis import SharedBasisLinear

__all__ = ['FilterBank', 'Patterns', 'check_finite', 'find_filter_banks']

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

    Raises:
        LeanError: The model has no convolution, a pattern matches none, or nothing is left.
    """
    banks: list[FilterBank] = []
    linear = [m for layer in model.modules() if isinstance(layer, SharedBasisLinear) for m in layer.modules()]
    seen = {id(m.weight) for m in linear if isinstance(m, (nn.Conv2d, FilterBasis))}
    for name, module in model.named_modules():
        # Two modules may be tied by one parameter; its filters exist once all the same.
        if isinstance(module, (nn.Conv2d, FilterBasis)) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            banks.append(FilterBank(name, module))
    if not banks:
        raise LeanError(f'{user} acts on 2-d convolutions, and {type(model).__name__} has none.')
    names = [bank.name for bank in banks]
    wanted = match_names(include, names, user, 'include', 'convolution')
    unwanted = match_names(exclude, names, user, 'exclude', 'convolution')
    chosen = [
        bank for i, bank in enumerate(banks)
        if (include is None or bank.name in wanted) and bank.name not in unwanted
        and not (skip_stem and i == 0) and not (skip_1x1 and bank.weight.shape[2:].numel() == 1)]
    if not chosen:
        raise LeanError(f'{user}: include, exclude, skip_stem and skip_1x1 leave none of the {len(banks)} convolutions '
                        f'({some_names(names)}).')
    return chosen


def check_finite(banks: Iterable[FilterBank], user: str) -> None:
    """Raise a LeanError that names the first bank with a NaN or infinite weight. Costs a device synchronization.

    Within torch.compile and torch.export there are no values to look at yet.
    """
    if torch.compiler.is_compiling():
        return
    for bank in banks:
        if not bank.weight.is_meta and not bool(torch.isfinite(bank.weight).all()):
            raise LeanError(f'{user}: the weights of {bank.name!r} are not all finite (NaN or infinity).')
