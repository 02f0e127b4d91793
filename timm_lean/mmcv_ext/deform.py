"""Deformable convolutions of `mmcv._ext`, versions 1 (offsets) and 2 (offsets and a modulation mask).

Both are torchvision's `deform_conv2d`: its layout of offsets, `(y, x)` pairs per tap within a deformable group, is
mmcv's. The buffers mmcv passes for im2col columns and ones are not needed; `im2col_step` bounds memory in mmcv and
has no effect on the result.

Source: Deformable ConvNets, Dai et al. 2017, arXiv 1703.06211, and v2, Zhu et al. 2019, arXiv 1811.11168;
torchvision.ops.deform_conv2d.
"""

from __future__ import annotations

import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

from .precision import exact, widen

__all__ = [
    'deform_conv_backward_input',
    'deform_conv_backward_parameters',
    'deform_conv_forward',
    'modulated_deform_conv_backward',
    'modulated_deform_conv_forward',
]


def _forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> Tensor:
    """Deformable convolution; `geometry` is stride, padding, dilation (each h, w), groups, deformable groups."""
    # torchvision takes placeholders for what is absent, a bias of zeros among them.
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    wide = widen(input, weight, offset, offset.new_zeros((len(input), 1)) if mask is None else mask, bias)
    return torch.ops.torchvision.deform_conv2d(*wide, *geometry, mask is not None)


def _backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    geometry: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """Gradients by input, weight, offset, mask and bias of `_forward`."""
    bias = weight.new_zeros(len(weight))
    mask_or_none = offset.new_zeros((len(input), 1)) if mask is None else mask
    wide = widen(grad_output, input, weight, offset, mask_or_none, bias)
    return torch.ops.torchvision._deform_conv2d_backward(*wide, *geometry, mask is not None)


def _accumulate(buffer: Tensor, gradient: Tensor) -> None:
    """Add a wide gradient to mmcv's buffer, in the buffer's format."""
    buffer += gradient.to(buffer.dtype)


@exact
def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Deformable convolution, version 1.

    Args:
        input: `[B, C, H, W]`.
        weight: `[O, C / group, kH, kW]`.
        offset: `[B, deformable_group * kH * kW * 2, Ho, Wo]`, `(y, x)` per tap.
        output: Filled, `[B, O, Ho, Wo]`.
        columns: Unused buffer.
        ones: Unused buffer.
        kW: Width of the kernel; kH its height.
        kH: See above.
        dW: Stride across; dH down.
        dH: See above.
        padW: Padding across; padH down.
        padH: See above.
        dilationW: Dilation across; dilationH down.
        dilationH: See above.
        group: Groups of the convolution.
        deformable_group: Groups of channels with offsets of their own.
        im2col_step: Unused.
    """
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    output.copy_(_forward(input, weight, offset, None, None, geometry))


@exact
def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    im2col_step: int,
) -> None:
    """Add the gradients of version 1 by input and offset to their buffers. Arguments as in `deform_conv_forward`."""
    geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
    grad_input, grad_weight, grad_offset, *_ = _backward(gradOutput, input, weight, offset, None, geometry)
    _accumulate(gradInput, grad_input)
    _accumulate(gradOffset, grad_offset)
    # mmcv asks for the weight's gradient in a second call, with the same gradient and buffer; it is computed already.
    columns.__dict__['weight_gradient'] = (gradOutput, grad_weight)


@exact
def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    kW: int,
    kH: int,
    dW: int,
    dH: int,
    padW: int,
    padH: int,
    dilationW: int,
    dilationH: int,
    group: int,
    deformable_group: int,
    scale: float,
    im2col_step: int,
) -> None:
    """Add the gradient of version 1 by weight, times `scale`, to its buffer. Arguments as in `deform_conv_forward`."""
    of_gradient, grad_weight = columns.__dict__.pop('weight_gradient', (None, None))
    if of_gradient is not gradOutput:
        geometry = (dH, dW, padH, padW, dilationH, dilationW, group, deformable_group)
        weight = torch.zeros_like(gradWeight)
        grad_weight = _backward(gradOutput, input, weight, offset, None, geometry)[1]
    _accumulate(gradWeight, grad_weight * scale)


@exact
def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Deformable convolution, version 2: each tap is also multiplied by a mask.

    Args:
        input: `[B, C, H, W]`.
        weight: `[O, C / group, kernel_h, kernel_w]`.
        bias: `[O]`, or anything without `with_bias`.
        ones: Unused buffer.
        offset: `[B, deformable_group * kernel_h * kernel_w * 2, Ho, Wo]`, `(y, x)` per tap.
        mask: `[B, deformable_group * kernel_h * kernel_w, Ho, Wo]`.
        output: Filled, `[B, O, Ho, Wo]`.
        columns: Unused buffer.
        kernel_h: Height of the kernel.
        kernel_w: Width of the kernel.
        stride_h: Stride down.
        stride_w: Stride across.
        pad_h: Padding down.
        pad_w: Padding across.
        dilation_h: Dilation down.
        dilation_w: Dilation across.
        group: Groups of the convolution.
        deformable_group: Groups of channels with offsets and masks of their own.
        with_bias: Whether `bias` is used.
    """
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    output.copy_(_forward(input, weight, offset, mask, bias if with_bias else None, geometry))


@exact
def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Add the gradients of version 2 to the five buffers. Arguments as in `modulated_deform_conv_forward`."""
    geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group)
    by_input, by_weight, by_offset, by_mask, by_bias = _backward(grad_output, input, weight, offset, mask, geometry)
    _accumulate(grad_input, by_input)
    _accumulate(grad_weight, by_weight)
    _accumulate(grad_offset, by_offset)
    _accumulate(grad_mask, by_mask)
    if with_bias:
        _accumulate(grad_bias, by_bias)
