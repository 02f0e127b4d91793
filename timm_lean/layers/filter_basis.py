"""Filters, or coefficients, that several layers use: one tensor, written once.

Sharing is *module* sharing: every layer of a group registers the same `FilterBasis` object. PyTorch then keeps the
tensor one through `.to()`, `to_empty()`, `deepcopy`, pickling and `load_state_dict(assign=True)`, and lists it once in
`parameters()`. The one thing PyTorch would do several times is write it into a state dict, so `FilterBasis` writes
itself only at the first of its places; that is what plain `safetensors.torch.save_file` needs.
"""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_lean.errors import LeanError

__all__ = ['FilterBasis', 'SharedCoefficients', 'init_orthonormal']


class FilterBasis(nn.Module):
    """A bank of convolution filters, used by one layer or shared by many.

    Args:
        num_filters: Number of filters N in the bank.
        in_channels: Channels of the input the filters are applied to.
        kernel_size: Side of the square kernels.
        groups: Convolution groups; a filter sees `in_channels / groups` channels.
        stage: Index of the network stage the bank serves, from 0.
        kind: Which convolution of a block the bank serves. The orthogonality loss joins banks of one stage and kind.

    Attributes:
        weight: The filters, `[N, in_channels / groups, kernel_size, kernel_size]`.
    """

    def __init__(
            self,
            num_filters: int,
            in_channels: int,
            kernel_size: int,
            groups: int = 1,
            stage: int = 0,
            kind: str = '',
            device: Any = None,
            dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if in_channels % groups or num_filters % groups:
            raise LeanError(
                f'in_channels={in_channels} and num_filters={num_filters} must both be divisible by groups={groups}.')
        self.num_filters = num_filters
        self.in_channels = in_channels
        self.kernel_size = (kernel_size, kernel_size)
        self.groups = groups
        self.stage = stage
        self.kind = kind
        self.weight = nn.Parameter(
            torch.empty(num_filters, in_channels // groups, kernel_size, kernel_size, device=device, dtype=dtype))
        self._loading: list[str] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_orthonormal(self)

    def extra_repr(self) -> str:
        return f'{self.num_filters}, {self.in_channels}, kernel_size={self.kernel_size}, groups={self.groups}'

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        # Whichever place comes first in *this* state dict writes, so a submodule saved alone is complete too.
        if not any(isinstance(t, torch.Tensor) and _same_memory(t, self.weight) for t in destination.values()):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
            self, state_dict: dict, prefix: str, local_metadata: dict, strict: bool,
            missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:
        # One load_state_dict() call passes the same `missing_keys` list to every place; holding the list (not its
        # id, which could be reused) tells the later places of one call from the first place of the next.
        first = self._loading is not missing_keys
        self._loading = missing_keys
        if first or prefix + 'weight' in state_dict:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_loading': None}


class SharedCoefficients(nn.Module):
    """A 1 x 1 convolution whose weights are those of a bank; the bias is its own.

    Args:
        bank: The weights, as `out_channels` filters of size 1 x 1 over `in_channels`.
        bias: Have a bias.

    Shape:
        Input `[B, in_channels, H, W]`, output `[B, out_channels, H, W]`.
    """
    groups = 1

    def __init__(self, bank: FilterBasis, bias: bool = False):
        super().__init__()
        self.in_channels, self.out_channels = bank.in_channels, bank.num_filters
        self.bank = bank
        self.bias = nn.Parameter(torch.zeros_like(bank.weight[:, 0, 0, 0])) if bias else None

    @property
    def weight(self) -> torch.Tensor:
        """`[out_channels, in_channels, 1, 1]`"""
        return self.bank.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, self.weight, self.bias)


def init_orthonormal(*banks: FilterBasis) -> None:
    """Initialize filter banks orthonormal, several banks jointly.

    The rows `[sum N, C / groups * k * k]` of all banks become orthonormal; where there are more rows than columns the
    columns do (semi-orthogonal).
    """
    with torch.no_grad():
        rows = torch.cat([bank.weight for bank in banks])
        nn.init.orthogonal_(rows)
        for bank, part in zip(banks, rows.split([bank.num_filters for bank in banks]), strict=True):
            bank.weight.copy_(part)


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """`Tensor.is_set_to`, which has no meta kernel."""
    return bool(a.shape == b.shape and a.storage_offset() == b.storage_offset()
                and a.untyped_storage()._cdata == b.untyped_storage()._cdata)
