"""Convolutions whose filters come from a basis shared with other layers.

Paper: `Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks`
- https://arxiv.org/abs/2006.05066 (Kang & Kim, NeurIPS 2021), section 3.
"""
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.fx
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Conv2dSame, pad_same

from timm_lean.errors import LeanError

from .filter_basis import FilterBasis, SharedCoefficients

torch.fx.wrap('pad_same')  # depends on sizes; symbolic tracing keeps the call

__all__ = ['SharedBasisConv2d', 'SharedBasisLinear', 'bn_scale_shift', 'is_plain_batchnorm', 'ungroup']


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
        coefficients: Combine the responses by a 1 x 1 convolution; a bank of 1 x 1 filters over the responses, which
            other layers may use too, gives its weights.
        coeff_groups: Groups of the coefficients; more than 1 only where they are those of all filters.
        norm_layer: Normalization between filters and coefficients, or None.
        padding: Zeros around the input; `kernel_size // 2` if None, TensorFlow's for 'same'.
        dilation: Dilation of the convolution.
        bias: Give the coefficients a bias.

    Shape:
        Input `[B, in_channels, H, W]`, output `[B, out_channels, ceil(H / stride), ceil(W / stride)]`
        at the default padding.

    Raises:
        LeanError: The ranks are not usable; the message names them.
    """

    __jit_unused_properties__: ClassVar = ['weight', 'bias']  # for code that looks at layers; scripted networks do not

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: int,
            basis: FilterBasis | None = None,
            unique_rank: int = 0,
            stride: int = 1,
            unique_groups: int | None = None,
            coefficients: bool | FilterBasis = True,
            coeff_groups: int = 1,
            norm_layer: type[nn.Module] | None = nn.BatchNorm2d,
            padding: int | str | None = None,
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
        if coefficients is False and rank != out_channels:
            raise LeanError(f'Without coefficients the {rank} filters must equal out_channels={out_channels}.')
        if basis is not None and (basis.in_channels, basis.kernel_size[0]) != (in_channels, kernel_size):
            raise LeanError(
                f'The basis is for {basis.in_channels} channels and {basis.kernel_size[0]} x {basis.kernel_size[0]} '
                f'kernels, the layer for {in_channels} and {kernel_size} x {kernel_size}.')
        if isinstance(coefficients, FilterBasis) and (
                coefficients.num_filters, coefficients.in_channels) != (out_channels, rank):
            raise LeanError(
                f'The coefficients are for {coefficients.in_channels} filters and {coefficients.num_filters} outputs, '
                f'the layer has {rank} and {out_channels}.')
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = (kernel_size, kernel_size)
        self.stride = (stride, stride)
        self.same_padding = padding == 'same'
        width = 0 if self.same_padding else kernel_size // 2 if padding is None else int(padding)
        self.padding = (width, width)
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
        if coeff_groups > 1 and any(bank.groups != coeff_groups for bank in self.banks()):
            raise LeanError(f'coeff_groups={coeff_groups} must be the groups of all filters.')
        self.coeff = (
            SharedCoefficients(coefficients, bias) if isinstance(coefficients, FilterBasis)
            else nn.Conv2d(rank, out_channels, 1, groups=coeff_groups, bias=bias, **dd) if coefficients
            else nn.Identity())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize what this layer owns; shared banks are initialized by whoever created them."""
        if self.unique is not None:
            self.unique.reset_parameters()
        if isinstance(self.coeff, nn.Conv2d):
            nn.init.kaiming_normal_(self.coeff.weight, mode='fan_out', nonlinearity='relu')
            if self.coeff.bias is not None:
                nn.init.zeros_(self.coeff.bias)

    def extra_repr(self) -> str:
        return (f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, '
                f'shared_rank={self.shared_rank}, unique_rank={self.unique_rank}'
                + (', padding=same' if self.same_padding else ''))

    @property
    def has_coefficients(self) -> bool:
        """Whether coefficients combine the filters' responses."""
        return not isinstance(self.coeff, nn.Identity)

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the layer that this one stands for, for code that looks at it or computes with it.

        Not there with a normalization inside, or with banks of unequal groups.
        """
        groups = {bank.groups for bank in self.banks()} | ({self.coeff.groups} if self.has_coefficients else set())
        if not isinstance(self.bn, nn.Identity) or len(groups) > 1:
            raise AttributeError(f'This {type(self).__name__} is more than one convolution and has no weight.')
        return self._composed_weight() if self.has_coefficients else self.joined_filters()

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of the coefficients."""
        return self.coeff.bias if self.has_coefficients else None  # type: ignore[return-value]

    def banks(self) -> list[FilterBasis]:
        """The layer's filter banks in the order of its channels: unique first, then shared."""
        return [bank for bank in (self.unique, self.basis) if bank is not None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102  (a branch of its own is one that TorchScript leaves out)
            if self._is_cheaper_composed(x):
                return self._composed(x)
        return self.coeff(self.bn(self._convolve(x)))

    def _is_cheaper_composed(self, x: torch.Tensor) -> bool:
        """Whether to multiply coefficients and filters first and convolve once, by counting multiplications.

        Possible without normalization only (converted networks), and left alone where nothing may depend on sizes.
        """
        coeff: Any = self.coeff
        if not isinstance(self.bn, nn.Identity) or not self.has_coefficients:
            return False
        if isinstance(x, torch.fx.Proxy) or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
        if coeff._forward_hooks or coeff._forward_pre_hooks or any(b.groups != coeff.groups for b in self.banks()):
            return False
        rank, out, dim = coeff.in_channels, self.out_channels, self.banks()[0].weight[0].numel()
        each = rank // coeff.groups  # filters that an output combines
        return self._places(x) * (rank * dim + out * each - out * dim) > out * each * dim

    def _places(self, x: torch.Tensor) -> int:
        """Number of positions of the output."""
        return x.shape[0] * math.prod(self.output_size(x.shape[2:]))

    def output_size(self, size: Sequence[int]) -> list[int]:
        """Height and width of the output for those of an input."""
        if self.same_padding:
            return [-(-n // stride) for n, stride in zip(size, self.stride, strict=True)]
        return [(n + 2 * pad - gap * (side - 1) - 1) // stride + 1 for n, side, stride, pad, gap in zip(
            size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)]

    def _composed_weight(self) -> torch.Tensor:
        coeff: Any = self.coeff
        with torch.autocast(coeff.weight.device.type, enabled=False):  # the sum over the filters in full precision
            filters = self.joined_filters()
            parts = filters.flatten(1).unflatten(0, (coeff.groups, -1))
            weight = coeff.weight.flatten(1).unflatten(0, (coeff.groups, -1)) @ parts
            return weight.reshape(-1, *filters.shape[1:])

    def _composed(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv(x, self._composed_weight(), self.coeff.groups, self.coeff.bias)  # type: ignore[arg-type]

    def joined_filters(self) -> torch.Tensor:
        """The filters of banks of equal groups as one, in the order of the responses."""
        weights = [bank.weight for bank in self.banks()]
        # Concatenating the weights is the same function as concatenating the outputs of two convolutions, without
        # launching one for a handful of filters.
        return weights[0] if len(weights) == 1 else _join(weights[0], weights[1], self.banks()[0].groups)

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        unique, basis = self.unique, self.basis
        if unique is None or basis is None:
            bank = unique if unique is not None else basis
            assert bank is not None
            return self._conv(x, bank.weight, bank.groups)
        if unique.groups == basis.groups:
            return self._conv(x, _join(unique.weight, basis.weight, basis.groups), basis.groups)
        return torch.cat([self._conv(x, bank.weight, bank.groups) for bank in (unique, basis)], 1)

    def _conv(
            self, x: torch.Tensor, weight: torch.Tensor, groups: int, bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.same_padding:
            x = pad_same(x, list(self.kernel_size), list(self.stride), list(self.dilation))
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    @torch.no_grad()
    def dense_weight_bias(self) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """The layer in eval mode as one convolution.

        Returns:
            Weight `[out_channels, in_channels / groups, k, k]` and bias `[out_channels]` (None without BN
            and bias), computed in float64 and returned in the filters' dtype, and the number of groups.
        """
        banks = self.banks()
        coeff: Any = self.coeff
        dtype = banks[0].weight.dtype
        agree = len({b.groups for b in banks}) == 1
        groups = banks[0].groups if agree else 1
        if self.has_coefficients:
            groups = coeff.groups  # coefficients of one group mix the filters of all
        if agree:
            weight = ungroup(self.joined_filters().detach().double(), banks[0].groups, groups)
        else:
            weight = torch.cat([ungroup(b.weight.detach().double(), b.groups, 1) for b in banks])
        bias = None
        if not isinstance(self.bn, nn.Identity):
            scale, bias = bn_scale_shift(self.bn)
            weight = weight * scale[:, None, None, None]
        if self.has_coefficients:
            mix = coeff.weight.double().flatten(1).unflatten(0, (groups, -1))  # [groups, out, rank]
            weight = torch.einsum('gor,grchw->gochw', mix, weight.unflatten(0, (groups, -1))).flatten(0, 1)
            if bias is not None:
                bias = torch.einsum('gor,gr->go', mix, bias.unflatten(0, (groups, -1))).flatten()
            if coeff.bias is not None:
                own = coeff.bias.double()
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
        dense = self._dense_layer(groups, {'bias': bias is not None, 'device': weight.device, 'dtype': weight.dtype})
        dense.weight = nn.Parameter(weight.clone().view_as(dense.weight))  # type: ignore[arg-type]
        if bias is not None:
            dense.bias = nn.Parameter(bias)
        return dense.train(self.training)

    def _dense_layer(self, groups: int, options: dict[str, Any]) -> nn.Module:
        kind = Conv2dSame if self.same_padding else nn.Conv2d
        return kind(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation, groups,
            **options)


class SharedBasisLinear(SharedBasisConv2d):
    """A linear layer of the same form: its filters see one position, which it applies to the last dimension.

    Args:
        in_features: Size of the input.
        out_features: Size of the output.
        basis: The shared filters `[N, in_features, 1, 1]`, or None.
        unique_rank: Number of filters of this layer alone.
        **options: `coefficients`, `bias`, `device` and `dtype` of `SharedBasisConv2d`.

    Shape:
        Input `[..., in_features]`, output `[..., out_features]`.
    """

    def __init__(
            self, in_features: int, out_features: int, basis: FilterBasis | None = None, unique_rank: int = 0,
            **options: Any):
        super().__init__(in_features, out_features, 1, basis, unique_rank, norm_layer=None, **options)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        coeff: Any = self.coeff
        if self._is_cheaper_composed(x):
            return F.linear(x, self._composed_weight().flatten(1), coeff.bias)
        return F.linear(F.linear(x, self.joined_filters().flatten(1)), coeff.weight.flatten(1), coeff.bias)

    @property
    def weight(self) -> torch.Tensor:
        """`[out_features, in_features]`"""
        return self._composed_weight().flatten(1)

    def _places(self, x: torch.Tensor) -> int:
        return x.numel() // self.in_features

    def _dense_layer(self, groups: int, options: dict[str, Any]) -> nn.Module:
        return nn.Linear(self.in_features, self.out_features, **options)


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


def ungroup(weight: torch.Tensor, groups: int, target: int) -> torch.Tensor:
    """Write a grouped weight as one of `target` groups (1 or unchanged), zeros where a filter does not look."""
    if groups == target:
        return weight
    n, c, kh, kw = weight.shape
    dense = weight.new_zeros(groups, n // groups, groups, c, kh, kw)
    index = torch.arange(groups, device=weight.device)
    dense[index, :, index] = weight.view(groups, n // groups, c, kh, kw)
    return dense.reshape(n, groups * c, kh, kw)
