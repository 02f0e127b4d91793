"""Sampling operators of `mmcv._ext`: multi-scale deformable attention, and what a masked convolution gathers.

Deformable attention is a weighted sum of bilinear samples, `out[q] = sum_l sum_p A[q, l, p] * V_l(loc[q, l, p])` per
head; the samples of one level are one `grid_sample`. The levels are added up one by one, so that memory is that of
one level.

Source: Deformable DETR, Zhu et al. 2020, arXiv 2010.04159.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import exact, widen

__all__ = ['masked_col2im_forward', 'masked_im2col_forward', 'ms_deform_attn_backward', 'ms_deform_attn_forward']


def _levels(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
) -> Iterator[tuple[int, slice, Tensor, Tensor, Tensor]]:
    """Yield every level as `grid_sample` wants it, with batch and heads in one dimension.

    Yields:
        Number of the level, its slice of the keys, map `[B * M, D, h, w]`, grid `[B * M, Q, P, 2]`, weights `[B * M,
        1, Q, P]`.
    """
    batch, _, heads, depth = value.shape
    queries, points = sampling_loc.shape[1], sampling_loc.shape[4]
    # One transfer to the host; grid_sample has to know the sizes.
    sizes = torch.cat((spatial_shapes.long(), level_start_index.long()[:, None]), dim=1).tolist()
    for level, (height, width, start) in enumerate(sizes):
        keys = slice(start, start + height * width)
        image = value[:, keys].permute(0, 2, 3, 1).reshape(batch * heads, depth, height, width)
        grid = sampling_loc[:, :, :, level].transpose(1, 2).reshape(batch * heads, queries, points, 2) * 2 - 1
        weight = attn_weight[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, points)
        yield level, keys, image, grid, weight


def _sample(image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image, grid, mode='bilinear', padding_mode='zeros', align_corners=False)


@exact
def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    im2col_step: int,
) -> Tensor:
    """Multi-scale deformable attention.

    Args:
        value: `[B, K, M, D]`, the cells of all levels, M heads.
        spatial_shapes: `[L, 2]`, height and width of the levels.
        level_start_index: `[L]`, where in K each level starts.
        sampling_loc: `[B, Q, M, L, P, 2]`, `(x, y)` in 0..1 of the level.
        attn_weight: `[B, Q, M, L, P]`.
        im2col_step: Unused.

    Returns:
        `[B, Q, M * D]`, in the format of `value`.
    """
    wide = widen(value, sampling_loc, attn_weight)
    batch, _, heads, depth = value.shape
    queries = sampling_loc.shape[1]
    total = wide[0].new_zeros((batch * heads, depth, queries))
    for _, _, image, grid, weight in _levels(wide[0], spatial_shapes, level_start_index, *wide[1:]):
        total += (_sample(image, grid) * weight).sum(-1)
    return total.view(batch, heads * depth, queries).transpose(1, 2).contiguous().to(value.dtype)


@exact
def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_loc: Tensor,
    attn_weight: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Add the gradients of `ms_deform_attn_forward` to the three buffers, shaped as what they are gradients of.

    Args:
        value: As in `ms_deform_attn_forward`; so are the next four.
        spatial_shapes: See above.
        level_start_index: See above.
        sampling_loc: See above.
        attn_weight: See above.
        grad_output: `[B, Q, M * D]`.
        grad_value: `[B, K, M, D]`.
        grad_sampling_loc: `[B, Q, M, L, P, 2]`.
        grad_attn_weight: `[B, Q, M, L, P]`.
        im2col_step: Unused.
    """
    *wide, grad = widen(value, sampling_loc, attn_weight, grad_output)
    batch, _, heads, depth = value.shape
    queries, points = sampling_loc.shape[1], sampling_loc.shape[4]
    grad = grad.view(batch, queries, heads, depth).permute(0, 2, 3, 1).reshape(batch * heads, depth, queries, 1)
    for level, keys, image, grid, weight in _levels(wide[0], spatial_shapes, level_start_index, *wide[1:]):
        by_weight = (_sample(image, grid) * grad).sum(1).view(batch, heads, queries, points).transpose(1, 2)
        # 0, 0, False: bilinear, zeros outside, corners not aligned.
        by_image, by_grid = torch.ops.aten.grid_sampler_2d_backward(
            grad * weight, image, grid, 0, 0, False, [True, True]
        )
        by_location = 2 * by_grid.view(batch, heads, queries, points, 2).transpose(1, 2)
        by_value = by_image.view(batch, heads, depth, -1).permute(0, 3, 1, 2)
        grad_value[:, keys] += by_value.to(grad_value.dtype)
        grad_sampling_loc[:, :, :, level] += by_location.to(grad_sampling_loc.dtype)
        grad_attn_weight[:, :, :, level] += by_weight.to(grad_attn_weight.dtype)


@exact
def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Gather the patches of chosen places of one image (stride 1).

    Args:
        im: `[1, C, H, W]`.
        mask_h_idx: Rows `[n]` of the places in the convolution's output, int64.
        mask_w_idx: Columns `[n]`, int64.
        col: Filled, `[C * kernel_h * kernel_w, n]`.
        kernel_h: Height of a patch.
        kernel_w: Width of a patch.
        pad_h: Zeros above and below the image.
        pad_w: Zeros left and right of it.
    """
    padded = F.pad(im[0], (pad_w, pad_w, pad_h, pad_h))
    rows = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=im.device)[None, :, None]
    # Places of a mask larger than the convolution's output read zeros, as outside the padding.
    inside = (rows < padded.shape[1]) & (columns < padded.shape[2])
    patches = padded[:, rows.clamp(max=padded.shape[1] - 1), columns.clamp(max=padded.shape[2] - 1)]
    col.copy_((patches * inside).view(col.shape))


@exact
def masked_col2im_forward(
    col: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    im: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Write the results of chosen places into an image.

    Args:
        col: `[channels, n]`.
        mask_h_idx: Rows `[n]`, int64.
        mask_w_idx: Columns `[n]`, int64.
        im: `[1, channels, height, width]`; other places keep what they hold.
        height: Of the image.
        width: Of the image.
        channels: Of the image.
    """
    im.view(channels, height, width)[:, mask_h_idx, mask_w_idx] = col.to(im.dtype)
