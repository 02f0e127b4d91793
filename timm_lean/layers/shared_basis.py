"""Convolutions whose filters come from a basis shared with other layers.

Paper: `Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks`
- https://arxiv.org/abs/2006.05066 (Kang & Kim, NeurIPS 2021), section 3.

Sharing is *module* sharing: every layer of a group registers the same `FilterBasis` object. PyTorch then keeps the
tensor one through `.to()`, `to_empty()`, `deepcopy`, pickling and `load_state_dict(assign=True)`, and lists it once in
`parameters()`. The one thing PyTorch would do several times is write it into a state dict, so `FilterBasis` writes
itself only at the first of its places; that is what plain `safetensors.torch.save_file` needs.
"""
from typing import Any

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F

from timm_lean.errors import LeanError

__all__ = ['FilterBasis', 'SharedBasisConv2d', 'init_orthonormal']


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


class SharedBasisConv2d(nn.Module):
    """Convolution by [unique | shared] filters, optionally followed by BN and 1 x 1 coefficients.

    With groups, where those of both banks agree, the order is [unique | shared] within each group.

    The whole chain `filters -> BN -> coefficients` is linear in eval mode and equals one dense convolution with bias
    (`dense_weight_bias`). Without BN that holds in training mode too, and where it is cheaper it is computed so.
    Without coefficients and BN it is a plain convolution whose weight is shared ("Shared" and "Shared++" in the paper).

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output. Without coefficients it must be the number of filters.
        kernel_size: Side of the square kernels.
        basis: The shared filters, or None for unique filters only.
        unique_rank: Number of filters of this layer alone.
        stride: Stride of the convolution.
        unique_groups: Groups of the unique filters; those of the basis if None.
        coefficients: Combine the responses by a 1 x 1 convolution.
        norm_layer: Normalization between filters and coefficients, or None.
        padding: Zeros around the input; `kernel_size // 2` if None.
        dilation: Dilation of the convolution.
        bias: Give the coefficients a bias.

    Shape:
        Input `[B, in_channels, H, W]`, output `[B, out_channels, ceil(H / stride), ceil(W / stride)]`
        at the default padding.

    Raises:
        LeanError: The ranks are not usable; the message names them.
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int,
            basis: FilterBasis | None = None,
            unique_rank: int = 0,
            stride: int = 1,
            unique_groups: int | None = None,
            coefficients: bool = True,
            norm_layer: type[nn.Module] | None = nn.BatchNorm2d,
            padding: int | None = None,
            dilation: int = 1,
            bias: bool = False,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ):
        super().__init__()
        shared_rank = basis.num_filters if basis is not None else 0
        rank = shared_rank + unique_rank
        if rank == 0:
            raise LeanError('shared_rank and unique_rank are both 0: the convolution would have no filters.')
        if bias and not coefficients:
            raise LeanError('bias=True needs coefficients=True: the bias is that of the coefficients.')
        if not coefficients and rank != out_channels:
            raise LeanError(f'Without coefficients the {rank} filters must equal out_channels={out_channels}.')
        if basis is not None and (basis.in_channels, basis.kernel_size[0]) != (in_channels, kernel_size):
            raise LeanError(
                f'The basis is for {basis.in_channels} channels and {basis.kernel_size[0]} x {basis.kernel_size[0]} '
                f'kernels, the layer for {in_channels} and {kernel_size} x {kernel_size}.')
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = (kernel_size, kernel_size)
        self.stride = (stride, stride)
        padding = kernel_size // 2 if padding is None else padding
        self.padding = (padding, padding)
        self.dilation = (dilation, dilation)
        self.shared_rank = shared_rank
        self.unique_rank = unique_rank
        dd = {'device': device, 'dtype': dtype}

        groups = basis.groups if basis is not None else 1
        self.unique = FilterBasis(
            unique_rank, in_channels, kernel_size, groups=groups if unique_groups is None else unique_groups, **dd,
        ) if unique_rank else None
        self.basis = basis
        self.bn = norm_layer(rank, **dd) if norm_layer is not None else nn.Identity()
        self.coeff = nn.Conv2d(rank, out_channels, 1, bias=bias, **dd) if coefficients else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize what this layer owns; the shared basis is initialized by whoever created it."""
        if self.unique is not None:
            self.unique.reset_parameters()
        if isinstance(self.coeff, nn.Conv2d):
            nn.init.kaiming_normal_(self.coeff.weight, mode='fan_out', nonlinearity='relu')
            if self.coeff.bias is not None:
                nn.init.zeros_(self.coeff.bias)

    def extra_repr(self) -> str:
        return (f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
                f'shared_rank={self.shared_rank}, unique_rank={self.unique_rank}')

    def banks(self) -> list[FilterBasis]:
        """The layer's filter banks in the order of its channels: unique first, then shared."""
        return [bank for bank in (self.unique, self.basis) if bank is not None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._is_cheaper_composed(x):
            return self._composed(x)
        return self.coeff(self.bn(self._convolve(x)))

    def _is_cheaper_composed(self, x: torch.Tensor) -> bool:
        """Whether to multiply coefficients and filters first and convolve once, by counting multiplications.

        Possible without normalization only (converted networks), and left alone where nothing may depend on sizes.
        """
        coeff = self.coeff
        if not isinstance(self.bn, nn.Identity) or not isinstance(coeff, nn.Conv2d):
            return False
        if isinstance(x, torch.fx.Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if coeff._forward_hooks or coeff._forward_pre_hooks or any(bank.groups > 1 for bank in self.banks()):
            return False
        places = x.shape[0] * (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[1])
        rank, out, dim = coeff.in_channels, self.out_channels, self.in_channels * self.kernel_size[0] ** 2
        return places * (rank * (dim + out) - out * dim) > out * rank * dim

    def _composed(self, x: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.coeff, nn.Conv2d)
        with torch.autocast(x.device.type, enabled=False):  # the sum over the filters in full precision
            filters = torch.cat([bank.weight for bank in self.banks()])
            weight = (self.coeff.weight.flatten(1) @ filters.flatten(1)).view(-1, *filters.shape[1:])
        return F.conv2d(x, weight, self.coeff.bias, self.stride, self.padding, self.dilation)

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        unique, basis = self.unique, self.basis
        if unique is None or basis is None:
            bank = unique if unique is not None else basis
            assert bank is not None
            return self._conv(x, bank.weight, bank.groups)
        if unique.groups == basis.groups:
            # Concatenating the weights is the same function as concatenating the outputs of two convolutions, without
            # launching one for a handful of filters.
            return self._conv(x, _join(unique.weight, basis.weight, basis.groups), basis.groups)
        return torch.cat([self._conv(x, bank.weight, bank.groups) for bank in (unique, basis)], 1)

    def _conv(self, x: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, groups)

    @torch.no_grad()
    def dense_weight_bias(self) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """The layer in eval mode as one convolution.

        Returns:
            Weight `[out_channels, in_channels / groups, k, k]` and bias `[out_channels]` (None without BN
            and bias), computed in float64 and returned in the filters' dtype, and the number of groups.
        """
        banks = self.banks()
        dtype = banks[0].weight.dtype
        agree = len({b.groups for b in banks}) == 1
        groups = banks[0].groups if agree and not isinstance(self.coeff, nn.Conv2d) else 1  # coefficients mix groups
        weights = [b.weight.detach().double() for b in banks]
        if agree:
            joined = weights[0] if len(weights) == 1 else _join(weights[0], weights[1], banks[0].groups)
            weight = ungroup(joined, banks[0].groups, groups)
        else:
            weight = torch.cat([ungroup(w, b.groups, 1) for w, b in zip(weights, banks, strict=True)])
        bias = None
        if not isinstance(self.bn, nn.Identity):
            scale, bias = bn_scale_shift(self.bn)
            weight = weight * scale[:, None, None, None]
        if isinstance(self.coeff, nn.Conv2d):
            mix = self.coeff.weight.double().flatten(1)  # [out, rank]
            weight = torch.einsum('or,rchw->ochw', mix, weight)
            bias = mix @ bias if bias is not None else None
            if self.coeff.bias is not None:
                own = self.coeff.bias.double()
                bias = own if bias is None else bias + own
        return weight.to(dtype), None if bias is None else bias.to(dtype), groups

    def fuse(self) -> nn.Module:
        """The layer as one dense convolution, which is what `timm.utils.reparameterize_model` puts in its place.

        Equal in eval mode. A layer whose normalization holds an activation, or has no running statistics, is no linear
        chain: it is returned as it is.
        """
        if not isinstance(self.bn, nn.Identity) and not is_plain_batchnorm(self.bn):
            return self
        weight, bias, groups = self.dense_weight_bias()
        conv = nn.Conv2d(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation, groups,
            bias=bias is not None, device=weight.device, dtype=weight.dtype)
        conv.weight = nn.Parameter(weight.clone())
        if bias is not None:
            conv.bias = nn.Parameter(bias)
        return conv.train(self.training)


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


def is_plain_batchnorm(module: nn.Module) -> bool:
    """Whether a module is, in eval mode, `scale * x + shift` per channel and nothing else."""
    return type(module) is nn.BatchNorm2d and module.track_running_stats


def bn_scale_shift(bn: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """A BatchNorm in eval mode as `y = scale * x + shift`, both `[C]` in float64."""
    assert isinstance(bn.running_mean, torch.Tensor) and isinstance(bn.running_var, torch.Tensor)
    inv_std = torch.rsqrt(bn.running_var.double() + bn.eps)  # type: ignore[operator]
    scale = inv_std if bn.weight is None else bn.weight.double() * inv_std  # type: ignore[operator]
    shift = -bn.running_mean.double() * scale
    return scale, shift if bn.bias is None else shift + bn.bias.double()  # type: ignore[operator]


def _join(unique: torch.Tensor, shared: torch.Tensor, groups: int) -> torch.Tensor:
    """The filters of two banks of equal groups as one: unique before shared within each group."""
    parts = [weight.unflatten(0, (groups, -1)) for weight in (unique, shared)]
    return torch.cat(parts, 1).flatten(0, 1)


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """`Tensor.is_set_to`, which has no meta kernel."""
    return (a.shape == b.shape and a.storage_offset() == b.storage_offset()
            and a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def ungroup(weight: torch.Tensor, groups: int, target: int) -> torch.Tensor:
    """Write a grouped weight as one of `target` groups (1 or unchanged), zeros where a filter does not look."""
    if groups == target:
        return weight
    n, c, kh, kw = weight.shape
    dense = weight.new_zeros(groups, n // groups, groups, c, kh, kw)
    index = torch.arange(groups, device=weight.device)
    dense[index, :, index] = weight.view(groups, n // groups, c, kh, kw)
    return dense.reshape(n, groups * c, kh, kw)
