"""Region operators of `mmcv._ext`: RoIAlign (average and maximum) and RoIPool.

RoIAlign's average is torchvision's kernel. Its maximum, and RoIPool, are computed here: torchvision has no maximum,
and its RoIPool rounds the region to whole cells first, which mmcv's does not. Both walk over the samples (cells) of a
bin, all bins at once.

Source: Mask R-CNN, He et al. 2017, arXiv 1703.06870; Fast R-CNN, Girshick 2015, arXiv 1504.08083.
"""

from __future__ import annotations

import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

from .precision import exact, widen

__all__ = ['roi_align_backward', 'roi_align_forward', 'roi_pool_backward', 'roi_pool_forward']

MAX, AVG = 0, 1
"""Numbers that mmcv gives RoIAlign's pooling modes."""


def _corners(y: Tensor, x: Tensor, height: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """The four cells, and their bilinear weights, that a sample at `(y, x)` reads.

    Within one cell outside the map a sample is moved to its edge; further out all weights are 0.

    Args:
        y: `[...]`, in cells.
        x: Same shape.
        height: Of the map.
        width: Of the map.

    Returns:
        Four pairs (flat index of the cell in the map, weight), each `[...]`.
    """
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    # Points outside have weight 0 and read cell 0; NaN, of a training that diverged, would be no index.
    y = torch.where(inside, y, 0).clamp_(0, height - 1)
    x = torch.where(inside, x, 0).clamp_(0, width - 1)
    top, left = y.floor(), x.floor()
    down, right = y - top, x - left
    rows = [(top.long(), 1 - down), ((top.long() + 1).clamp_(max=height - 1), down)]
    columns = [(left.long(), 1 - right), ((left.long() + 1).clamp_(max=width - 1), right)]
    return [(row * width + column, wy * wx * inside) for row, wy in rows for column, wx in columns]


def _sample_grid(
    rois: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where RoIAlign samples: start, bin size and number of samples per bin, each `[R, 2]`, as `(y, x)`."""
    corners = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    start = corners[:, [1, 0]]
    size = corners[:, [3, 2]] - start
    if not aligned:
        size = size.clamp(min=1)
    bin_size = torch.stack((size[:, 0] / pooled_height, size[:, 1] / pooled_width), dim=1)
    counts = torch.full_like(bin_size, sampling_ratio) if sampling_ratio > 0 else bin_size.ceil()
    return start, bin_size, counts


@exact
def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign.

    A region with no sample at all (no extent, and `sampling_ratio=0`) gives 0; mmcv's maximum would be the lowest
    float there.

    Args:
        input: `[N, C, H, W]`.
        rois: `[R, 5]`, index of the image and box in pixels.
        output: Filled, `[R, C, aligned_height, aligned_width]`.
        argmax_y: Filled in maximum mode, shape of `output`: row of the sample that won, -1 if none.
        argmax_x: Likewise, column.
        aligned_height: Bins per region, down.
        aligned_width: Bins per region, across.
        spatial_scale: Cells per pixel.
        sampling_ratio: Samples per bin and axis; 0: as many as the bin has cells.
        pool_mode: 0 maximum, 1 average.
        aligned: Take pixel centres at half-integers.

    Raises:
        ValueError: If `pool_mode` is neither 0 nor 1.
    """
    if pool_mode not in (MAX, AVG):
        raise ValueError(f'roi_align: pool_mode must be 0 (max) or 1 (avg), got {pool_mode}')
    features, rois = widen(input, rois)
    if pool_mode == AVG:
        output.copy_(
            torch.ops.torchvision.roi_align(
                features, rois, spatial_scale, aligned_height, aligned_width, sampling_ratio, aligned
            )
        )
        return
    channels, height, width = features.shape[1:]
    cells = features.permute(0, 2, 3, 1).reshape(-1, channels)
    start, bin_size, counts = _sample_grid(rois, aligned_height, aligned_width, spatial_scale, sampling_ratio, aligned)
    first_cell = rois[:, 0].long() * (height * width)
    best = features.new_full((len(rois), aligned_height, aligned_width, channels), -torch.inf)
    best_y, best_x = torch.full_like(best, -1), torch.full_like(best, -1)
    bins_y = torch.arange(aligned_height, device=rois.device)
    bins_x = torch.arange(aligned_width, device=rois.device)
    steps_y, steps_x = counts.amax(0).tolist() if len(rois) else (0, 0)
    for step_y in range(int(steps_y)):
        for step_x in range(int(steps_x)):
            # Regions differ in their number of samples: those that have this one.
            live = ((step_y < counts[:, 0]) & (step_x < counts[:, 1])).nonzero().flatten()
            y = start[live, :1] + bin_size[live, :1] * (bins_y + (step_y + 0.5) / counts[live, :1])
            x = start[live, 1:] + bin_size[live, 1:] * (bins_x + (step_x + 0.5) / counts[live, 1:])
            y, x = torch.broadcast_tensors(y[:, :, None], x[:, None, :])
            value = torch.zeros_like(best[live])
            for cell, weight in _corners(y, x, height, width):
                value += cells[first_cell[live, None, None] + cell] * weight[..., None]
            wins = value > best[live]
            best[live] = torch.where(wins, value, best[live])
            best_y[live] = torch.where(wins, y[..., None], best_y[live])
            best_x[live] = torch.where(wins, x[..., None], best_x[live])
    best.masked_fill_(best == -torch.inf, 0)
    for buffer, result in ((output, best), (argmax_y, best_y), (argmax_x, best_x)):
        buffer.copy_(result.permute(0, 3, 1, 2))


@exact
def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of RoIAlign; adds it to `grad_input` `[N, C, H, W]`. Arguments as in `roi_align_forward`."""
    grad, rois = widen(grad_output, rois)
    batch, channels, height, width = grad_input.shape
    if pool_mode == AVG:
        grad_input += torch.ops.torchvision._roi_align_backward(
            grad,
            rois,
            spatial_scale,
            aligned_height,
            aligned_width,
            batch,
            channels,
            height,
            width,
            sampling_ratio,
            aligned,
        ).to(grad_input.dtype)
        return
    y, x = argmax_y.to(grad.dtype), argmax_x.to(grad.dtype)
    has_sample = (y != -1) & (x != -1)
    total = grad.new_zeros(batch * channels * height * width)
    first_cell = _first_cell(rois, channels, height * width)
    for cell, weight in _corners(y, x, height, width):
        total.index_add_(0, (first_cell + cell).flatten(), (grad * weight * has_sample).flatten())
    grad_input += total.view_as(grad_input).to(grad_input.dtype)


def _first_cell(rois: Tensor, channels: int, cells: int) -> Tensor:
    """Flat index `[R, C, 1, 1]` of the first cell of every region's image and channel in `[N, C, H, W]`."""
    channel = torch.arange(channels, device=rois.device)
    return ((rois[:, :1].long() * channels + channel) * cells)[..., None, None]


@exact
def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """RoIPool: the largest cell of each bin, the region covering `[x1, x2 + 1) * spatial_scale` without rounding.

    Args:
        input: `[N, C, H, W]`.
        rois: `[R, 5]`, index of the image and box in pixels.
        output: Filled, `[R, C, pooled_height, pooled_width]`; 0 for a bin without cells.
        argmax: Filled, same shape, int32: flat index of the winning cell in its map, -1 for a bin without cells.
        pooled_height: Bins per region, down.
        pooled_width: Bins per region, across.
        spatial_scale: Cells per pixel.
    """
    features, rois = widen(input, rois)
    channels, height, width = features.shape[1:]
    low = rois[:, [2, 1]] * spatial_scale
    size = (rois[:, [4, 3]] + 1) * spatial_scale - low
    edges = []
    for axis, (bins, length) in enumerate(((pooled_height, height), (pooled_width, width))):
        number = torch.arange(bins, device=rois.device)
        step = size[:, axis, None] / bins
        first = (number * step + low[:, axis, None]).floor().clamp(0, length)
        last = ((number + 1) * step + low[:, axis, None]).ceil().clamp(0, length)
        last = torch.where((size > 0).all(1)[:, None], last, first)
        edges.append((first.long(), (last - first).long()))
    (top, rows), (left, columns) = edges
    shape = (len(rois), pooled_height, pooled_width)
    top, rows = (edge[:, :, None].expand(shape).flatten() for edge in (top, rows))
    left, columns = (edge[:, None, :].expand(shape).flatten() for edge in (left, columns))
    image = rois[:, 0].long()[:, None, None].expand(shape).flatten()

    cells = features.permute(0, 2, 3, 1).reshape(-1, channels)
    best = features.new_full((len(image), channels), -torch.inf)
    winner = torch.full_like(best, -1, dtype=torch.long)
    steps = torch.stack((rows, columns)).amax(1).tolist() if len(image) else (0, 0)
    for row in range(steps[0]):
        for column in range(steps[1]):
            live = ((row < rows) & (column < columns)).nonzero().flatten()
            cell = (top[live] + row) * width + left[live] + column
            value = cells[image[live] * (height * width) + cell]
            wins = value > best[live]
            best[live] = torch.where(wins, value, best[live])
            winner[live] = torch.where(wins, cell[:, None], winner[live])
    best.masked_fill_(winner == -1, 0)
    output.copy_(best.view(*shape, channels).permute(0, 3, 1, 2))
    argmax.copy_(winner.view(*shape, channels).permute(0, 3, 1, 2))


@exact
def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Gradient of RoIPool; adds it to `grad_input` `[N, C, H, W]`. Arguments as in `roi_pool_forward`."""
    grad, rois = widen(grad_output, rois)
    channels, height, width = grad_input.shape[1:]
    total = grad.new_zeros(grad_input.numel())
    cell = _first_cell(rois, channels, height * width) + argmax.clamp(min=0)
    total.index_add_(0, cell.flatten(), (grad * (argmax >= 0)).flatten())
    grad_input += total.view_as(grad_input).to(grad_input.dtype)
