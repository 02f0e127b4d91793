"""timm's convolutions that compute their weight or their padding: what they compute."""
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame

from .shared_basis import SharedBasisConv2d

__all__ = ['STANDARDIZED', 'dense_weight', 'pads_same']

STANDARDIZED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


@torch.no_grad()
def dense_weight(layer: Any) -> torch.Tensor:
    """The weight that a convolution or linear layer computes with, standardized where it does that."""
    if not isinstance(layer, STANDARDIZED):
        return layer.weight.detach()
    gain = (layer.gain * layer.scale).flatten() if isinstance(layer, (ScaledStdConv2d, ScaledStdConv2dSame)) else None
    flat = layer.weight.reshape(1, layer.out_channels, -1)
    return F.batch_norm(flat, None, None, gain, training=True, momentum=0., eps=layer.eps).view_as(layer.weight)


def pads_same(layer: Any) -> bool:
    """Whether a convolution pads as TensorFlow does, by the size of its input."""
    if isinstance(layer, SharedBasisConv2d):
        return layer.same_padding
    return isinstance(layer, Conv2dSame) or getattr(layer, 'same_pad', False)
