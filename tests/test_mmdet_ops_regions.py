"""The stand-in's kernels for regions and deformable convolutions, and what the tests of the other kernels share.

Each is checked through mmcv's own autograd functions: values against torchvision or a definition written out cell by
cell, gradients by finite differences in float64, and half precision against float32.
"""

# ruff: noqa: E402  (the stand-in has to be in place before anything imports mmcv.ops)
from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.autograd import gradcheck

from timm_lean import mmcv_ext as ops

pytest.importorskip('mmcv')
ops.install()

import mmcv.ops
from mmcv import _ext

HALF = [torch.float16, torch.bfloat16]


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_half_close(kernel: Callable[..., Tensor], *inputs: Tensor, dtype: torch.dtype) -> None:
    """Values and gradients of a kernel in half precision are those of float32 on the same (rounded) inputs, rounded."""
    halves = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs]
    wide = [x.detach().float().requires_grad_(x.requires_grad) for x in halves]
    out, expected = kernel(*halves), kernel(*wide)
    assert out.dtype == dtype
    tolerance = dict(rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(out.float(), expected, **tolerance)
    out.float().sum().backward()
    expected.sum().backward()
    for half, full in zip(halves, wide, strict=True):
        if half.requires_grad:
            assert half.grad is not None and full.grad is not None and half.grad.dtype == dtype
            scale = full.grad.abs().max().item()
            torch.testing.assert_close(
                half.grad.float(), full.grad, rtol=tolerance['rtol'], atol=tolerance['atol'] * scale
            )


# --- regions

ROIS = torch.tensor(
    [[0, 1.3, 2.1, 9.7, 12.4], [1, 0, 0, 15.2, 3.3], [1, -6, -4, 8.5, 30], [0, 5, 5, 5.6, 5.9]], dtype=torch.float64
)


def bilinear(image: Tensor, y: float, x: float) -> float:
    """Value of a map `[H, W]` at a point, as RoIAlign reads it."""
    height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    dy, dx = y - top, x - left
    above = image[top, left] * (1 - dx) + image[top, right] * dx
    below = image[bottom, left] * (1 - dx) + image[bottom, right] * dx
    return float(above * (1 - dy) + below * dy)


def naive_roi_align(
    features: Tensor, rois: Tensor, size: int, scale: float, ratio: int, mode: str, aligned: bool
) -> Tensor:
    output = torch.zeros(len(rois), features.shape[1], size, size, dtype=features.dtype)
    for r, (image, *box) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = (c * scale - (0.5 if aligned else 0) for c in box)
        height, width = y2 - y1, x2 - x1
        if not aligned:
            height, width = max(height, 1), max(width, 1)
        steps_y = ratio or math.ceil(height / size)
        steps_x = ratio or math.ceil(width / size)
        for c in range(features.shape[1]):
            for i in range(size):
                for j in range(size):
                    values = [
                        bilinear(
                            features[int(image), c],
                            y1 + height / size * (i + (a + 0.5) / steps_y),
                            x1 + width / size * (j + (b + 0.5) / steps_x),
                        )
                        for a in range(steps_y)
                        for b in range(steps_x)
                    ]
                    output[r, c, i, j] = max(values) if mode == 'max' else sum(values) / len(values)
    return output


@pytest.mark.parametrize('aligned', [True, False])
@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_is_the_definition(mode: str, ratio: int, aligned: bool) -> None:
    features = torch.randn(2, 2, 9, 11, dtype=torch.float64)
    found = mmcv.ops.roi_align(features, ROIS, 3, 0.5, ratio, mode, aligned)
    torch.testing.assert_close(found, naive_roi_align(features, ROIS, 3, 0.5, ratio, mode, aligned))
    if mode == 'avg':
        torch.testing.assert_close(found, torchvision.ops.roi_align(features, ROIS, 3, 0.5, ratio, aligned))


@pytest.mark.parametrize('ratio', [0, 2])
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_gradient(mode: str, ratio: int) -> None:
    features = double(2, 1, 5, 6)
    assert gradcheck(lambda x: mmcv.ops.roi_align(x, ROIS, (2, 3), 0.4, ratio, mode, True), features)


def test_roi_align_maximum_remembers_where() -> None:
    features = torch.zeros(1, 1, 8, 8)
    features[0, 0, 3, 5] = 1
    output = torch.empty(1, 1, 1, 1)
    argmax_y, argmax_x = torch.empty_like(output), torch.empty_like(output)
    arguments = dict(aligned_height=1, aligned_width=1, spatial_scale=1.0, sampling_ratio=8, pool_mode=0, aligned=True)
    _ext.roi_align_forward(features, torch.tensor([[0.0, 0, 0, 8, 8]]), output, argmax_y, argmax_x, **arguments)
    assert (output.item(), argmax_y.item(), argmax_x.item()) == (1, 3, 5)
    # Of equal samples the first wins.
    _ext.roi_align_forward(features * 0, torch.tensor([[0.0, 0, 0, 8, 8]]), output, argmax_y, argmax_x, **arguments)
    assert (argmax_y.item(), argmax_x.item()) == (0, 0)
    # A box of NaNs reads nothing, and no memory that is not its own.
    nan = mmcv.ops.roi_align(
        features, torch.full((1, 5), torch.nan).index_fill_(1, torch.tensor([0]), 0), 2, 1.0, 2, 'max'
    )
    assert not nan.any()
    # A region of no extent has no samples: zero, and no gradient.
    arguments['sampling_ratio'] = 0
    _ext.roi_align_forward(features, torch.tensor([[0.0, 4, 4, 4, 4]]), output, argmax_y, argmax_x, **arguments)
    assert (output.item(), argmax_y.item(), argmax_x.item()) == (0, -1, -1)
    gradient = torch.zeros_like(features)
    _ext.roi_align_backward(output + 1, torch.zeros(1, 5), argmax_y, argmax_x, gradient, **arguments)
    assert not gradient.any()


def naive_roi_pool(features: Tensor, rois: Tensor, size: int, scale: float) -> Tensor:
    output = torch.zeros(len(rois), features.shape[1], size, size, dtype=features.dtype)
    height, width = features.shape[2:]
    for r, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        for i in range(size):
            for j in range(size):
                top = max(math.floor(y1 + i * (y2 - y1) / size), 0)
                bottom = min(math.ceil(y1 + (i + 1) * (y2 - y1) / size), height)
                left = max(math.floor(x1 + j * (x2 - x1) / size), 0)
                right = min(math.ceil(x1 + (j + 1) * (x2 - x1) / size), width)
                if top < bottom and left < right:
                    output[r, :, i, j] = features[int(image), :, top:bottom, left:right].amax((1, 2))
    return output


def test_roi_pool_is_the_definition() -> None:
    features = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    # Turned inside out, outside of the map, and without width.
    empty = torch.tensor([[0, 9, 9, 3, 3], [1, 50, 50, 60, 60], [0, 3.25, 2, 2.25, 9]], dtype=torch.float64)
    found = mmcv.ops.roi_pool(features, torch.cat((ROIS, empty)), 3, 0.5)
    torch.testing.assert_close(found[:-3], naive_roi_pool(features, ROIS, 3, 0.5))
    assert not found[-3:].any()


def test_roi_pool_gradient() -> None:
    rois = torch.cat((ROIS, torch.tensor([[0, 9, 9, 3, 3]], dtype=torch.float64)))
    assert gradcheck(lambda x: mmcv.ops.roi_pool(x, rois, (2, 3), 0.4), double(2, 1, 5, 6))


@pytest.mark.parametrize('dtype', HALF)
@pytest.mark.parametrize('mode', ['avg', 'max'])
def test_roi_align_in_half_precision(mode: str, dtype: torch.dtype) -> None:
    rois = torch.tensor([[0, 1, 2, 9, 12], [1, 0, 0, 15, 3]], dtype=dtype)
    # Sample positions that half precision holds exactly; argmax buffers are in the format of the features.
    features = torch.randn(2, 2, 9, 11, requires_grad=True)
    assert_half_close(lambda x: mmcv.ops.roi_align(x, rois.to(x), 1, 0.5, 1, mode, False), features, dtype=dtype)


def test_roi_align_of_half_features_and_float_regions_and_no_regions() -> None:
    features = torch.randn(2, 2, 9, 11).half()
    assert mmcv.ops.roi_align(features, ROIS.float(), 3, 0.5).dtype == torch.float16
    for mode in ('avg', 'max'):
        assert mmcv.ops.roi_align(features, ROIS[:0].half(), 3, 0.5, 0, mode).shape == (0, 2, 3, 3)
    assert mmcv.ops.roi_pool(features, ROIS[:0].half(), 3, 0.5).shape == (0, 2, 3, 3)


# --- deformable convolutions


def naive_deform_conv(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, stride: int, pad: int, dilation: int, groups: int
) -> Tensor:
    """Deformable convolution by its definition; zero outside of the map."""
    batch, channels, height, width = x.shape
    out_channels, _, kernel, _ = weight.shape
    offset_groups = offset.shape[1] // (2 * kernel * kernel)
    out = torch.zeros(batch, out_channels, *offset.shape[2:], dtype=x.dtype)
    x, offset, mask, weight = (tensor.detach() for tensor in (x, offset, mask, weight))
    padded = F.pad(x, (1, 1, 1, 1))

    def read(b: int, c: int, y: float, xx: float) -> float:
        if not (-1 < y < height and -1 < xx < width):
            return 0.0
        return bilinear(padded[b, c], y + 1, xx + 1)

    for b in range(batch):
        for o in range(out_channels):
            group = o // (out_channels // groups)
            for i in range(offset.shape[2]):
                for j in range(offset.shape[3]):
                    for c in range(channels // groups):
                        channel = group * (channels // groups) + c
                        og = channel // (channels // offset_groups)
                        for tap in range(kernel * kernel):
                            at = og * kernel * kernel + tap
                            y = i * stride - pad + tap // kernel * dilation + offset[b, 2 * at, i, j].item()
                            xx = j * stride - pad + tap % kernel * dilation + offset[b, 2 * at + 1, i, j].item()
                            w = weight[o, c, tap // kernel, tap % kernel] * mask[b, at, i, j]
                            out[b, o, i, j] += w * read(b, channel, y, xx)
    return out


@pytest.mark.parametrize(('stride', 'dilation', 'groups', 'offset_groups'), [(1, 1, 1, 1), (2, 1, 2, 2), (1, 2, 1, 2)])
def test_deform_conv_is_the_definition(stride: int, dilation: int, groups: int, offset_groups: int) -> None:
    x, weight, bias = double(2, 4, 5, 6), double(2, 4 // groups, 3, 3), double(2)
    layer = mmcv.ops.DeformConv2d(4, 2, 3, stride, 1, dilation, groups, offset_groups).double()
    rows, columns = ((n + 2 - 2 * dilation - 1) // stride + 1 for n in (5, 6))
    offset, mask = double(2, 18 * offset_groups, rows, columns), double(2, 9 * offset_groups, rows, columns)
    found = mmcv.ops.deform_conv2d(x, offset, weight, stride, 1, dilation, groups, offset_groups)
    expected = naive_deform_conv(x, offset, torch.ones_like(mask), weight, stride, 1, dilation, groups)
    torch.testing.assert_close(found, expected)
    assert layer(x, offset).shape == found.shape
    arguments = (stride, 1, dilation, groups, offset_groups)
    found = mmcv.ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *arguments)
    expected = naive_deform_conv(x, offset, mask, weight, stride, 1, dilation, groups) + bias[:, None, None]
    torch.testing.assert_close(found, expected)


def test_deform_conv_gradients() -> None:
    x, weight, bias = double(2, 4, 4, 4), double(2, 2, 3, 3), double(2)
    offset, mask = double(2, 36, 2, 2), double(2, 18, 2, 2)
    arguments = (2, 1, 1, 2, 2)
    assert gradcheck(lambda *t: mmcv.ops.deform_conv2d(*t, *arguments), (x, offset, weight))
    # Only the weight wants a gradient: mmcv then skips the call that would have computed it along the way.
    assert gradcheck(lambda w: mmcv.ops.deform_conv2d(x.detach(), offset.detach(), w, *arguments), weight)
    assert gradcheck(lambda *t: mmcv.ops.modulated_deform_conv2d(*t, *arguments), (x, offset, mask, weight, bias))
    assert gradcheck(lambda *t: mmcv.ops.modulated_deform_conv2d(*t, None, *arguments), (x, offset, mask, weight))


def test_deform_conv_second_backward_does_not_reuse_the_first() -> None:
    x, offset, weight = double(1, 2, 4, 4), double(1, 18, 4, 4), double(2, 2, 3, 3)
    out = mmcv.ops.deform_conv2d(x, offset, weight, 1, 1)
    (only_input,) = torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)
    (three,) = torch.autograd.grad(out, weight, 3 * torch.ones_like(out), retain_graph=True)
    (one,) = torch.autograd.grad(out, weight, torch.ones_like(out))
    torch.testing.assert_close(three, 3 * one)
    assert only_input.shape == x.shape


def test_deform_conv_reuses_the_gradient_of_the_same_backward_only() -> None:
    x, offset, weight = torch.randn(1, 2, 4, 4), torch.randn(1, 18, 4, 4), torch.randn(2, 2, 3, 3)
    common = dict(kW=3, kH=3, dW=1, dH=1, padW=1, padH=1, dilationW=1, dilationH=1, group=1, deformable_group=1)
    upstream, other, buffer = torch.ones(1, 2, 4, 4), 3 * torch.ones(1, 2, 4, 4), torch.empty(0)
    gradients = []
    for of_parameters in (upstream, other):
        ignored = torch.zeros_like(x), torch.zeros_like(offset)
        _ext.deform_conv_backward_input(x, offset, upstream, *ignored, weight, buffer, **common, im2col_step=1)
        gradients.append(torch.zeros_like(weight))
        _ext.deform_conv_backward_parameters(
            x, offset, of_parameters, gradients[-1], buffer, buffer, **common, scale=1, im2col_step=1
        )
    torch.testing.assert_close(gradients[1], 3 * gradients[0])


def test_deform_conv_backward_inside_autocast_stays_exact() -> None:
    inputs = [
        t.float().detach().requires_grad_() for t in (double(2, 4, 5, 5), double(2, 18, 5, 5), double(4, 4, 3, 3))
    ]
    expected = torch.autograd.grad(mmcv.ops.deform_conv2d(*inputs, 1, 1).square().sum(), inputs)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        found = torch.autograd.grad(mmcv.ops.deform_conv2d(*inputs, 1, 1).square().sum(), inputs)
    torch.testing.assert_close(found, expected)


def test_deform_conv_scales_and_accumulates() -> None:
    x, offset, weight = torch.randn(1, 2, 4, 4), torch.randn(1, 18, 4, 4), torch.randn(2, 2, 3, 3)
    common = dict(kW=3, kH=3, dW=1, dH=1, padW=1, padH=1, dilationW=1, dilationH=1, group=1, deformable_group=1)
    gradients = [torch.ones_like(weight), torch.zeros_like(weight)]
    for gradient, scale in zip(gradients, (2.0, 1.0), strict=True):
        buffers = torch.empty(0), torch.empty(0)
        _ext.deform_conv_backward_parameters(
            x, offset, torch.ones(1, 2, 4, 4), gradient, *buffers, **common, scale=scale, im2col_step=1
        )
    torch.testing.assert_close(gradients[0], 2 * gradients[1] + 1)


@pytest.mark.parametrize('dtype', HALF)
def test_deform_conv_in_half_precision(dtype: torch.dtype) -> None:
    x, weight, bias = double(2, 4, 5, 5), double(4, 4, 3, 3), double(4)
    offset, mask = double(2, 18, 5, 5), double(2, 9, 5, 5)
    assert_half_close(lambda *t: mmcv.ops.deform_conv2d(*t, 1, 1), x, offset, weight, dtype=dtype)
    assert_half_close(lambda *t: mmcv.ops.modulated_deform_conv2d(*t, 1, 1), x, offset, mask, weight, bias, dtype=dtype)


def test_deform_conv_layers_under_autocast() -> None:
    x = torch.randn(2, 4, 6, 6)
    for kind in (mmcv.ops.DeformConv2dPack, mmcv.ops.ModulatedDeformConv2dPack):
        layer = kind(4, 4, 3, padding=1)
        expected = layer(x)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            out = layer(x)
            assert out.dtype == torch.bfloat16  # that of the predicted offsets
            out.sum().backward()
        torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
        assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.any()
