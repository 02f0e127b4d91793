"""CARAFE of `mmcv._ext`: upsampling by a kernel predicted for every output cell.

`out[c, y, x] = sum_{i, j} features[c, y // s + i - r, x // s + j - r] * masks[g(c), i, j, y, x]`, with s the scale, r
half the kernel and g(c) the group of channel c. The sum runs over the taps of the kernel, each tap for all cells at
once, so that memory is that of the output and not kernel^2 times the features.

`carafe` and `carafe_naive` are one function here. mmcv tells them apart by memory layout only, through buffers whose
names start with `r`; of those `rfeatures` counts, because the backward of `carafe` gets the features through it.

Source: CARAFE, Wang et al. 2019, arXiv 1905.02188.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from .precision import exact, widen

__all__ = ['carafe_backward', 'carafe_forward', 'carafe_naive_backward', 'carafe_naive_forward']


def _taps(kernel_size: int, height: int, width: int) -> Iterator[tuple[int, slice, slice]]:
    """Yield every tap: its number, and the rows and columns of the padded features it reads."""
    for tap in range(kernel_size * kernel_size):
        row, column = divmod(tap, kernel_size)
        yield tap, slice(row, row + height), slice(column, column + width)


def _padded(features: Tensor, kernel_size: int, group_size: int) -> Tensor:
    """Features `[N, C, H, W]` as `[N, G, C / G, H + 2 r, W + 2 r]`."""
    r = kernel_size // 2
    return F.pad(features.unflatten(1, (group_size, -1)), (r, r, r, r))


def _by_cell(tensor: Tensor, group_size: int, scale_factor: int) -> Tensor:
    """Split `[N, G * X, H * s, W * s]` into `[N, G, X, H, s, W, s]`, which shows the features' cells."""
    s = scale_factor
    batch, channels, height, width = tensor.shape
    return tensor.reshape(batch, group_size, channels // group_size, height // s, s, width // s, s)


def _forward(
    features: Tensor,
    masks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    height, width = features.shape[2:]
    features, masks = widen(features, masks)
    padded = _padded(features, kernel_size, group_size)
    by_cell = _by_cell(masks, group_size, scale_factor)
    total = features.new_zeros(output.shape)
    cells = _by_cell(total, group_size, scale_factor)
    for tap, rows, columns in _taps(kernel_size, height, width):
        cells.addcmul_(padded[..., rows, columns][..., None, :, None], by_cell[:, :, tap, None])
    output.copy_(total)


def _backward(
    grad_output: Tensor,
    features: Tensor,
    masks: Tensor,
    grad_input: Tensor,
    grad_masks: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    height, width = features.shape[2:]
    grad, features, masks = widen(grad_output, features, masks)
    padded = _padded(features, kernel_size, group_size)
    grad_padded = padded.new_zeros(padded.shape)
    grad_cells = _by_cell(grad, group_size, scale_factor)
    masks_by_cell = _by_cell(masks, group_size, scale_factor)
    grad_wide_masks = masks.new_zeros(masks.shape)
    grad_masks_by_cell = _by_cell(grad_wide_masks, group_size, scale_factor)
    for tap, rows, columns in _taps(kernel_size, height, width):
        grad_padded[..., rows, columns] += (grad_cells * masks_by_cell[:, :, tap, None]).sum(dim=(4, 6))
        read = padded[..., rows, columns][..., None, :, None]
        grad_masks_by_cell[:, :, tap] = (grad_cells * read).sum(dim=2)
    r = kernel_size // 2
    grad_features = grad_padded[..., r : r + height, r : r + width].flatten(1, 2)
    grad_input += grad_features.to(grad_input.dtype)
    grad_masks += grad_wide_masks.to(grad_masks.dtype)


@exact
def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """CARAFE.

    Args:
        features: `[N, C, H, W]`.
        masks: `[N, group_size * kernel_size^2, H * scale_factor, W * scale_factor]`.
        rfeatures: `[N, C, H, W]`, filled with the features, for `carafe_backward`.
        routput: Unused buffer.
        rmasks: Unused buffer.
        output: Filled, `[N, C, H * scale_factor, W * scale_factor]`.
        kernel_size: Side of the kernels, odd.
        group_size: Groups of channels with kernels of their own.
        scale_factor: Output cells per cell and axis.
    """
    rfeatures.copy_(features)
    _forward(features, masks, output, kernel_size, group_size, scale_factor)


@exact
def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Add the gradients of `carafe_forward` by features and masks to `bottom_grad` and `mask_grad`.

    The four other buffers are unused.
    """
    _backward(top_grad, rfeatures, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)


@exact
def carafe_naive_forward(
    features: Tensor,
    masks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """CARAFE; arguments as in `carafe_forward`."""
    _forward(features, masks, output, kernel_size, group_size, scale_factor)


@exact
def carafe_naive_backward(
    top_grad: Tensor,
    features: Tensor,
    masks: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Add the gradients of `carafe_naive_forward` by features and masks to `bottom_grad` and `mask_grad`."""
    _backward(top_grad, features, masks, bottom_grad, mask_grad, kernel_size, group_size, scale_factor)
