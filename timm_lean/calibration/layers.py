"""Layers as linear maps of their unfolded inputs: what is fitted, layer kind by layer kind."""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Conv2dSame
from timm.layers.padding import get_same_padding

from timm_lean.layers import SharedBasisConv2d
from timm_lean.layers.shared_basis import bn_scale_shift

__all__ = ['Coefficients', 'ConvFilters', 'LinearMap', 'is_layer', 'linear_map', 'patches', 'rows_of']


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution or linear layer that computes with its weights as they are."""
    if type(module) in (nn.Conv2d, Conv2dSame):
        return module.padding_mode == 'zeros'
    return type(module) in (nn.Linear, SharedBasisConv2d)


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
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
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

    def inputs(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        """Samples `[n, groups, size]` of an input of the layer."""
        samples = self._samples(x, positions)
        return F.pad(samples, (0, 1), value=1.) if self.bias else samples

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

    def _bias(self) -> Any:
        return self.layer.bias

    def _free_kernels(self) -> torch.Tensor | None:
        return None

    def _samples(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        rows = rows_of(self.layer, x)
        return (rows if positions is None else rows[:, positions]).flatten(0, 1)[:, None]


class ConvFilters(LinearMap):
    """The filters of a convolution. Kernels that are zero stay zero."""

    @property
    def block(self) -> int:  # type: ignore[override]
        return int(self._kernel[0, 0].numel())

    def _free_kernels(self) -> torch.Tensor | None:
        live = (self._kernel != 0).flatten(2).any(2)
        return None if bool(live.all()) else live[:, :, None, None]

    def _samples(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        return patches(self.layer, x, positions).unflatten(1, (self.layer.groups, -1))


class Coefficients(LinearMap):
    """The coefficients of a shared-basis layer, whose inputs are the responses of its filters."""

    def _bias(self) -> Any:
        return self.layer.coeff.bias

    def _free_kernels(self) -> torch.Tensor | None:
        live = self._kernel != 0
        return None if bool(live.all()) else live

    def _samples(self, x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        filters = torch.cat([bank.weight for bank in self.layer.banks()]).flatten(1)
        responses = patches(self.layer, x, positions) @ filters.T
        if not isinstance(self.layer.bn, nn.Identity):
            scale, shift = bn_scale_shift(self.layer.bn)
            responses = responses * scale.to(x.dtype) + shift.to(x.dtype)
        return responses[:, None]


def linear_map(layer: Any, norm: nn.Module | None = None) -> LinearMap | None:
    """What can be fitted of a layer by itself, None if nothing can.

    Args:
        layer: A layer that `is_layer` knows.
        norm: A batch norm that alone reads the layer's output. It serves layers without a bias as one.
    """
    if not all(p.requires_grad for p in layer.parameters()):
        return None
    if isinstance(layer, SharedBasisConv2d):
        if not isinstance(layer.coeff, nn.Conv2d) or any(bank.groups > 1 for bank in layer.banks()):
            return None
        return Coefficients(layer, layer.coeff.weight, norm if layer.coeff.bias is None else None)
    norm = norm if layer.bias is None else None
    return (LinearMap if isinstance(layer, nn.Linear) else ConvFilters)(layer, layer.weight, norm)


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
        if isinstance(layer, Conv2dSame):
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
    if isinstance(layer, nn.Linear):
        return y.flatten(1, -2) if y.ndim > 2 else y[:, None]
    return y.flatten(2).transpose(1, 2)
