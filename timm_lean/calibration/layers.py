"""Layers as linear maps of their unfolded inputs: what is fitted, layer kind by layer kind."""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Conv2dSame, Linear
from timm.layers.padding import get_same_padding

from timm_lean.layers import SharedBasisConv2d, SharedBasisLinear, SharedCoefficients
from timm_lean.layers.shared_basis import bn_scale_shift
from timm_lean.layers.standardized import pads_same

__all__ = ['Coefficients', 'ConvFilters', 'LinearMap', 'is_layer', 'linear_map', 'patches', 'rows_of', 'unfolded']


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution or linear layer that computes with its weights as they are."""
    if type(module) in (nn.Conv2d, Conv2dSame):
        return module.padding_mode == 'zeros'
    return type(module) in (nn.Linear, Linear, SharedBasisConv2d, SharedBasisLinear)


class LinearMap:
    """A layer's outputs as weights times inputs.

    Attributes:
        weight: The weights, `[groups, filters, size]`; with a bias, that is the last input's, which is 1.
        free: Mask of the weights that may change, None for all.
        bias: Whether there is a bias.
        groups, filters, size: The shape of the weights.
        block: So many neighbouring weights are free together.
    """
    block = 1

    def __init__(self, layer: Any, weight: torch.Tensor, norm: nn.Module | None):
        self.layer = layer
        self.norm = norm
        self.bias = self._bias() is not None or norm is not None
        groups = self._groups()
        self._kernel = weight
        rows = weight.detach().flatten(1).view(groups, len(weight) // groups, -1)
        free = self._free_kernels()
        self.free = None if free is None else free.expand(weight.shape).reshape(rows.shape)
        if self.bias:
            bias = self._bias()
            column = rows.new_zeros(len(weight)) if bias is None else bias.detach()
            rows = torch.cat([rows, column.view(groups, -1, 1)], 2)
            self.free = None if self.free is None else F.pad(self.free, (0, 1), value=True)
        self.weight = rows
        self.groups, self.filters, self.size = rows.shape

    def free_bias(self) -> bool:
        """Leave nothing free but the bias; False if there is none."""
        self.free = torch.zeros_like(self.weight, dtype=torch.bool)
        self.free[..., -1] = True
        return self.bias

    def inputs(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Samples `[n, groups, size]` of an input of the layer."""
        samples = self._samples(x, positions)
        return F.pad(samples, (0, 1), value=1.) if self.bias else samples

    def outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        """The layer's outputs `[n, channels]` for samples of its inputs."""
        return torch.einsum('ngd,god->ngo', inputs, self.weight).flatten(1)

    def onto(self, outputs: torch.Tensor) -> torch.Tensor:
        """What the weights can bring about of outputs `[n, channels]`, `[n, groups, filters]`."""
        return outputs.unflatten(1, (self.groups, self.filters))

    def shift(self, change: torch.Tensor) -> torch.Tensor:
        """By how much a change of the weights moves each output channel, whatever the input; `[channels]`."""
        return change[..., -1].flatten()

    @torch.no_grad()
    def assign(self, weight: torch.Tensor) -> None:
        """Give the layer new weights, `[groups, filters, size]`."""
        self.weight = weight.to(self.weight.dtype)
        if self.bias:
            column = weight[..., -1].flatten()
            weight = weight[..., :-1]
            bias = self._bias()
            if bias is not None:
                bias.copy_(column)
            else:
                # the batch norm behind subtracts a mean: a bias in front of it is the same as another mean
                self.norm.running_mean.sub_(column)  # type: ignore[union-attr, operator]
                self.weight[..., -1] = 0
        self._kernel.copy_(weight.reshape(self._kernel.shape))

    def _groups(self) -> int:
        return self.layer.groups if isinstance(self.layer, nn.Conv2d) else 1

    def _bias(self) -> Any:
        return self.layer.bias

    def _free_kernels(self) -> torch.Tensor | None:
        return None

    def _samples(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        return unfolded(self.layer, x, positions)


class ConvFilters(LinearMap):
    """The filters of a convolution. Kernels that are zero stay zero."""

    @property
    def block(self) -> int:  # type: ignore[override]
        return int(self._kernel[0, 0].numel())

    def _free_kernels(self) -> torch.Tensor | None:
        live = (self._kernel != 0).flatten(2).any(2)
        return None if bool(live.all()) else live[:, :, None, None]


class Coefficients(LinearMap):
    """The coefficients of a shared-basis layer, whose inputs are the responses of its filters."""

    def _groups(self) -> int:
        return self.layer.coeff.groups

    def _bias(self) -> Any:
        return self.layer.coeff.bias

    def _free_kernels(self) -> torch.Tensor | None:
        live = self._kernel != 0
        return None if bool(live.all()) else live

    def _samples(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        inputs = unfolded(self.layer, x, positions)
        filters = self.layer.joined_filters().flatten(1).unflatten(0, (inputs.shape[1], -1))
        responses = torch.einsum('ngd,grd->ngr', inputs, filters)
        if not isinstance(self.layer.bn, nn.Identity):
            scale, shift = (t.to(x.dtype).unflatten(0, (inputs.shape[1], -1)) for t in bn_scale_shift(self.layer.bn))
            responses = responses * scale + shift
        return responses


class FiltersForShared(LinearMap):
    """The own filters of a layer whose coefficients other layers use too.

    With `C = Q R`, `Q` orthonormal, the filters `R B` lie in the outputs' own geometry: what they can bring about is
    the projection on `Q`, and they are fitted to it as those of any layer are.
    """

    def __init__(self, layer: Any, norm: nn.Module | None):
        self.layer, self.norm, self.free = layer, norm, None
        self.bias = self._bias() is not None or norm is not None
        self._q, self._r = torch.linalg.qr(layer.coeff.weight.detach().flatten(1))
        # the last input's weights are a change of the bias, which itself need not lie where filters reach
        self.weight = F.pad(self._r @ layer.unique.weight.detach().flatten(1), (0, int(self.bias)))[None]
        self.groups, self.filters, self.size = self.weight.shape

    def free_bias(self) -> bool:
        return False  # a new bias would mean new filters

    def outputs(self, inputs: torch.Tensor) -> torch.Tensor:
        bias = self._bias()
        outputs = super().outputs(inputs) @ self._q.T
        return outputs if bias is None else outputs + bias

    def onto(self, outputs: torch.Tensor) -> torch.Tensor:
        return (outputs @ self._q)[:, None]

    def shift(self, change: torch.Tensor) -> torch.Tensor:
        return self._q.to(change.dtype) @ super().shift(change)

    @torch.no_grad()
    def assign(self, weight: torch.Tensor) -> None:
        self.weight = weight = weight.to(self.weight.dtype)
        if self.bias:
            column = self._q @ weight[0, :, -1]
            if self._bias() is not None:
                self._bias().add_(column)
            else:
                self.norm.running_mean.sub_(column)  # type: ignore[union-attr, operator]
            weight = weight[..., :-1]
            self.weight[..., -1] = 0
        filters = self.layer.unique.weight
        filters.copy_(torch.linalg.solve_triangular(self._r, weight[0], upper=True).view_as(filters))

    def _bias(self) -> Any:
        return self.layer.coeff.bias


def linear_map(layer: Any, norm: nn.Module | None = None) -> LinearMap | None:
    """What can be fitted of a layer by itself, None if nothing can.

    Args:
        layer: A layer that `is_layer` knows.
        norm: A batch norm that alone reads the layer's output. It serves layers without a bias as one.
    """
    if not all(p.requires_grad for p in layer.parameters()):
        return None
    if isinstance(layer, SharedBasisConv2d):
        if not layer.has_coefficients or any(bank.groups != layer.coeff.groups for bank in layer.banks()):
            return None
        norm = norm if layer.coeff.bias is None else None
        if isinstance(layer.coeff, SharedCoefficients):
            return _filters_for_shared(layer, norm)
        return Coefficients(layer, layer.coeff.weight, norm)  # type: ignore[arg-type]
    norm = norm if layer.bias is None else None
    return (LinearMap if isinstance(layer, nn.Linear) else ConvFilters)(layer, layer.weight, norm)


def _filters_for_shared(layer: Any, norm: nn.Module | None) -> LinearMap | None:
    """None where zeros must stay, or coefficients depend on each other."""
    weight = layer.coeff.weight.detach().flatten(1)
    whole = bool((layer.unique.weight != 0).all()) and isinstance(layer.bn, nn.Identity)
    if not whole or weight.shape[0] < weight.shape[1] or torch.linalg.cond(weight) > 1e4:
        return None
    return FiltersForShared(layer, norm)


def unfolded(layer: Any, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """What the filters of a layer see at some positions, `[n, groups, size]`; see `patches`."""
    if isinstance(layer, (nn.Linear, SharedBasisLinear)):
        rows = rows_of(layer, x)
        return (rows if positions is None else rows[:, positions]).flatten(0, 1)[:, None]
    groups = layer.banks()[0].groups if isinstance(layer, SharedBasisConv2d) else layer.groups
    return patches(layer, x, positions).unflatten(1, (groups, -1))


def patches(layer: Any, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """What a convolution sees at some positions of its output.

    Args:
        layer: The convolution.
        x: Its input, `[B, C, H, W]`.
        positions: Indices into the flattened output map, the same for all images; all if None.

    Returns:
        `[B * positions, C * kh * kw]`
    """
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    (top, bottom), (left, right) = _padding(layer, x)
    x = F.pad(x, (left, right, top, bottom))
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    if positions is None:
        positions = torch.arange(height * width, device=x.device)
    rows = (positions // width * sh)[:, None] + torch.arange(kh, device=x.device) * dh
    columns = (positions % width * sw)[:, None] + torch.arange(kw, device=x.device) * dw
    places = (rows[:, :, None] * x.shape[3] + columns[:, None, :]).flatten()
    seen = x.flatten(2).index_select(2, places)  # [B, C, positions * kh * kw]
    return seen.unflatten(2, (-1, kh * kw)).transpose(1, 2).flatten(0, 1).flatten(1)


def _padding(layer: Any, x: torch.Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    both = []
    for i in range(2):
        k, s, d = layer.kernel_size[i], layer.stride[i], layer.dilation[i]
        if pads_same(layer):
            total = int(get_same_padding(x.shape[2 + i], k, s, d))
        elif isinstance(layer.padding, str):
            total = d * (k - 1) if layer.padding == 'same' else 0
        else:
            both.append((layer.padding[i], layer.padding[i]))
            continue
        both.append((total // 2, total - total // 2))
    return both[0], both[1]


def rows_of(layer: Any, y: torch.Tensor) -> torch.Tensor:
    """A layer's output or input as `[B, positions, channels]`."""
    if isinstance(layer, (nn.Linear, SharedBasisLinear)):
        return y.flatten(1, -2) if y.ndim > 2 else y[:, None]
    return y.flatten(2).transpose(1, 2)
