"""The stand-in's kernels for focal losses, deformable attention, masked convolution and CARAFE.

Checked like those of `test_mmdet_ops_regions.py`: definitions, finite differences, half precision.
"""

# ruff: noqa: E402  (the stand-in has to be in place before anything imports mmcv.ops)
from __future__ import annotations

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
from mmcv.ops.focal_loss import sigmoid_focal_loss, softmax_focal_loss
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch
from test_mmdet_ops_regions import HALF, assert_half_close, bilinear, double

# --- focal losses


@pytest.mark.parametrize('gamma', [0.0, 0.5, 2.0])
def test_sigmoid_focal_loss(gamma: float) -> None:
    logits, target = double(6, 4), torch.tensor([0, 3, 1, 4, 2, -1])
    found = sigmoid_focal_loss(logits, target, gamma, 0.3, None, 'none')
    # A target of -1 or 4 is background: all four classes are negative.
    one_hot = torch.stack([target == c for c in range(4)], dim=1).double()
    expected = torchvision.ops.sigmoid_focal_loss(logits, one_hot, alpha=0.3, gamma=gamma)
    torch.testing.assert_close(found, expected)
    assert gradcheck(lambda x: sigmoid_focal_loss(x, target, gamma, 0.3, None, 'mean'), logits)
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    rows = torch.tensor([1.0, 3.0, 2.0, 1.0, 0.5, 1.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(sigmoid_focal_loss(logits, target, gamma, 0.3, weight, 'none'), expected * rows)
    assert gradcheck(lambda x: sigmoid_focal_loss(x, target, gamma, 0.3, weight, 'sum'), logits)


def test_sigmoid_focal_loss_of_a_confident_mistake() -> None:
    logits = torch.tensor([[60.0], [-60.0]])
    found = sigmoid_focal_loss(logits, torch.tensor([1, 0]), 2.0, 0.25, None, 'none')
    torch.testing.assert_close(found, torch.tensor([[0.75 * 60.0], [0.25 * 60.0]]))


@pytest.mark.parametrize('gamma', [0.5, 1.0, 2.0])
def test_softmax_focal_loss(gamma: float) -> None:
    logits, target = double(5, 3), torch.tensor([0, 2, 1, -1, 1])
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    for class_weight in (None, weight):
        p = logits.softmax(1)
        expected = torch.zeros(5, dtype=torch.float64)
        for n, t in enumerate(target.tolist()):
            if t >= 0:
                factor = 0.3 if class_weight is None else 0.3 * weight[t]
                expected[n] = -factor * (1 - p[n, t]) ** gamma * p[n, t].log()
        found = softmax_focal_loss(logits, target, gamma, 0.3, class_weight, 'none')
        torch.testing.assert_close(found, expected)
        # mmcv multiplies a gradient [N, C] by grad_output, which fits for reduced losses.
        assert gradcheck(lambda x, w=class_weight: softmax_focal_loss(x, target, gamma, 0.3, w, 'mean'), logits)


@pytest.mark.parametrize('dtype', HALF)
def test_focal_losses_in_half_precision(dtype: torch.dtype) -> None:
    target = torch.tensor([0, 2, 1, 3, 1])
    logits = double(5, 3)
    assert_half_close(lambda x: sigmoid_focal_loss(x, target, 2.0, 0.25, None, 'none'), logits, dtype=dtype)
    p = torch.randn(5, 3).softmax(1)
    losses = [torch.empty(5, dtype=kind) for kind in (dtype, torch.float32)]
    for loss in losses:
        _ext.softmax_focal_loss_forward(p.to(loss.dtype), target.clamp(max=2), p[:0, 0], loss, gamma=2.0, alpha=0.25)
    torch.testing.assert_close(losses[0].float(), losses[1], rtol=0.05, atol=0.01)


# --- deformable attention


def attention_inputs(batch: int = 2, queries: int = 3, heads: int = 2, depth: int = 2, points: int = 2) -> list[Tensor]:
    shapes = torch.tensor([[4, 3], [2, 5]])
    starts = torch.tensor([0, 12])
    value = double(batch, 22, heads, depth)
    location = (torch.rand(batch, queries, heads, 2, points, 2, dtype=torch.float64) * 1.4 - 0.2).requires_grad_()
    weight = torch.rand(batch, queries, heads, 2, points, dtype=torch.float64).requires_grad_()
    return [value, shapes, starts, location, weight]


def test_deformable_attention_is_the_definition() -> None:
    value, shapes, starts, location, weight = attention_inputs()
    found = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, location, weight, 64)
    torch.testing.assert_close(found, multi_scale_deformable_attn_pytorch(value, shapes, location, weight))
    expected = torch.zeros(2, 3, 2, 2, dtype=torch.float64)
    for b in range(2):
        for level, ((height, width), start) in enumerate(zip(shapes.tolist(), starts.tolist(), strict=True)):
            image = value[b, start : start + height * width].detach().view(height, width, 2, 2)
            for q in range(3):
                for head in range(2):
                    for d in range(2):
                        padded = F.pad(image[:, :, head, d], (1, 1, 1, 1))
                        for point in range(location.shape[4]):
                            x, y = location[b, q, head, level, point].tolist()
                            w = weight[b, q, head, level, point].item()
                            y, x = y * height - 0.5, x * width - 0.5
                            if -1 < y < height and -1 < x < width:
                                expected[b, q, head, d] += w * bilinear(padded, y + 1, x + 1)
    torch.testing.assert_close(found, expected.flatten(2))


def test_deformable_attention_gradients() -> None:
    value, shapes, starts, location, weight = attention_inputs()
    assert gradcheck(
        lambda v, at, w: MultiScaleDeformableAttnFunction.apply(v, shapes, starts, at, w, 64), (value, location, weight)
    )


@pytest.mark.parametrize('dtype', HALF)
def test_deformable_attention_in_half_precision(dtype: torch.dtype) -> None:
    value, shapes, starts, location, weight = attention_inputs()
    assert_half_close(
        lambda v, at, w: MultiScaleDeformableAttnFunction.apply(v, shapes, starts, at, w, 64),
        *(value, location, weight),
        dtype=dtype,
    )


# --- masked convolution


@pytest.mark.parametrize('dtype', [torch.float32, *HALF])
def test_masked_conv_is_the_convolution_where_the_mask_is(dtype: torch.dtype) -> None:
    conv = mmcv.ops.MaskedConv2d(3, 4, 3, padding=1).eval().to(dtype)
    x = torch.randn(1, 3, 6, 7).to(dtype)
    mask = (torch.rand(1, 6, 7) > 0.6).float()
    with torch.no_grad():
        found, everywhere = conv(x, mask), conv(x)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, everywhere * mask.to(dtype), rtol=tolerance, atol=tolerance)
    assert not conv(x, torch.zeros_like(mask)).any()


def test_masked_im2col_reads_zeros_outside() -> None:
    columns = torch.empty(4, 2)
    at = torch.tensor([0, 2])
    _ext.masked_im2col_forward(
        torch.arange(1.0, 10).view(1, 1, 3, 3), at, at, columns, kernel_h=2, kernel_w=2, pad_h=0, pad_w=0
    )
    assert columns.T.tolist() == [[1, 2, 4, 5], [9, 0, 0, 0]]


# --- CARAFE


def naive_carafe(features: Tensor, masks: Tensor, kernel: int, groups: int, scale: int) -> Tensor:
    batch, channels, height, width = features.shape
    padded = F.pad(features, [kernel // 2] * 4)
    out = torch.zeros(batch, channels, height * scale, width * scale, dtype=features.dtype)
    for c in range(channels):
        group = c // (channels // groups)
        for y in range(height * scale):
            for x in range(width * scale):
                patch = padded[:, c, y // scale : y // scale + kernel, x // scale : x // scale + kernel]
                of_cell = masks[:, group * kernel**2 : (group + 1) * kernel**2, y, x].view(batch, kernel, kernel)
                out[:, c, y, x] = (patch * of_cell).sum((1, 2))
    return out


def test_carafe_is_the_definition_and_has_its_gradients() -> None:
    features, masks = double(2, 4, 3, 2), double(2, 18, 6, 4)
    expected = naive_carafe(features, masks, 3, 2, 2)
    torch.testing.assert_close(mmcv.ops.carafe(features, masks, 3, 2, 2), expected)
    torch.testing.assert_close(mmcv.ops.carafe_naive(features, masks, 3, 2, 2), expected)
    assert gradcheck(lambda f, m: mmcv.ops.carafe(f, m, 3, 2, 2), (features, masks))
    # mmcv's own function for the naive one insists on CUDA in backward, so its kernel is called directly.
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (features, masks), upstream)
    found = torch.zeros_like(features), torch.zeros_like(masks)
    _ext.carafe_naive_backward(upstream, features, masks, *found, kernel_size=3, group_size=2, scale_factor=2)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize('dtype', HALF)
def test_carafe_in_half_precision(dtype: torch.dtype) -> None:
    features, masks = double(1, 4, 3, 3), double(1, 9, 6, 6)
    assert_half_close(lambda f, m: mmcv.ops.carafe(f, m, 3, 1, 2), features, masks, dtype=dtype)
