"""The kinds of layers that can be factorized: which, and the layers that take their place."""
from typing import Any

import torch.nn as nn
from timm.layers import Conv2dSame, Linear

from timm_lean.layers import FilterBasis, SharedBasisConv2d, SharedBasisLinear
from timm_lean.layers.standardized import STANDARDIZED, pads_same

__all__ = ['factorized', 'shape_of', 'why_not']

_CONVOLUTIONS = (nn.Conv2d, Conv2dSame, *STANDARDIZED)


def why_not(layer: nn.Module) -> str:
    """Why a convolution or linear layer cannot be factorized; '' if it can."""
    if type(layer) in (nn.Linear, Linear):
        return ''
    # the exact type: subclasses compute their weight or their padding at run time
    if type(layer) not in _CONVOLUTIONS:
        return f'a {type(layer).__name__} computes its weights by itself'
    assert isinstance(layer, nn.Conv2d)
    if layer.groups > 1 and layer.groups == layer.in_channels:
        return 'depthwise'
    if layer.padding_mode != 'zeros' or isinstance(layer.padding, str):
        return f'padding {layer.padding_mode if isinstance(layer.padding, tuple) else layer.padding}'
    if any(a != b for a, b in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)):
        return 'not square'
    return ''


def shape_of(layer: nn.Module) -> tuple[int, int, int, int]:
    """Inputs, outputs, side of the kernels and groups of a layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features, 1, 1
    assert isinstance(layer, nn.Conv2d)
    return layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.groups


def factorized(
        layer: Any, basis: FilterBasis | None, coefficients: FilterBasis | bool, unique_rank: int,
) -> SharedBasisConv2d:
    """What takes a layer's place, its values left to chance but for the bias.

    Args:
        layer: The layer.
        basis: Filters that it shares, or None.
        coefficients: Coefficients that it shares, or True for its own.
        unique_rank: Filters of its own.
    """
    options: dict[str, Any] = {
        'coefficients': coefficients, 'bias': layer.bias is not None, 'device': layer.weight.device,
        'dtype': layer.weight.dtype}
    new: SharedBasisConv2d
    if isinstance(layer, nn.Linear):
        new = SharedBasisLinear(layer.in_features, layer.out_features, basis, unique_rank, **options)
    else:
        new = SharedBasisConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size[0], basis, unique_rank, stride=layer.stride[0],
            coeff_groups=layer.groups, norm_layer=None, padding='same' if pads_same(layer) else layer.padding[0],
            dilation=layer.dilation[0], **options)
    if layer.bias is not None:
        new.coeff.bias = layer.bias
    return new.train(layer.training)
