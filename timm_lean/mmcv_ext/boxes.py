"""Box operators of `mmcv._ext`: non-maximum suppression in four forms, and overlaps.

Boxes are `(x1, y1, x2, y2)`. With `offset=1` a side is `x2 - x1 + 1` pixels long, the convention of the first
detectors.

Source: torchvision.ops.nms; Soft-NMS, Bodla et al. 2017, arXiv 1704.04503; NMS-match, Cao et al. 2020 (PISA), arXiv
1904.04821.
"""

from __future__ import annotations

import torch
import torchvision  # noqa: F401  (registers torch.ops.torchvision)
from torch import Tensor

from .precision import exact, widen

__all__ = ['bbox_overlaps', 'nms', 'nms_match', 'softnms']

NAIVE, LINEAR, GAUSSIAN = 0, 1, 2
"""Numbers that mmcv gives the decay methods of Soft-NMS."""

IOU, IOF = 0, 1
"""Numbers that mmcv gives the overlap modes: intersection over union, over the first box."""


def _areas(boxes: Tensor, offset: int) -> Tensor:
    """Areas `[...]` of boxes `[..., 4]`."""
    sides = boxes[..., 2:] - boxes[..., :2] + offset
    return sides[..., 0] * sides[..., 1]


def _intersections(boxes1: Tensor, boxes2: Tensor, offset: int) -> Tensor:
    """Areas shared by boxes `[..., 4]` and `[..., 4]` that broadcast against each other."""
    top_left = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    sides = (torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - top_left + offset).clamp_(min=0)
    return sides[..., 0] * sides[..., 1]


@exact
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: `[N, 4]`.
        scores: `[N]`.
        iou_threshold: A box is dropped when it overlaps a kept one by *more* than this.
        offset: 0 or 1, added to the sides of the boxes.

    Returns:
        Indices `[K]` of the kept boxes, int64, by falling score (equal scores: the earlier box first).
    """
    boxes, scores = widen(boxes, scores)
    if offset:
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    return torch.ops.torchvision.nms(boxes, scores, iou_threshold)


@exact
def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int = 0,
) -> Tensor:
    """Soft-NMS: take the best box, lower the scores of the boxes it overlaps, repeat.

    The factor is 0 (naive) or `1 - iou` (linear) where `iou >= iou_threshold`, else 1; or `exp(-iou^2 / sigma)`
    everywhere (gaussian). Boxes whose lowered score falls below `min_score` are dropped; the very first box is taken
    whatever its score. Equal scores are resolved by input order, where mmcv's depends on its swaps; two boxes of no
    area do not overlap, where mmcv's gaussian factor becomes NaN.

    Args:
        boxes: `[N, 4]`.
        scores: `[N]`.
        dets: `[N, 5]`, its first K rows are filled with the taken boxes and their lowered scores.
        iou_threshold: See above.
        sigma: See above.
        min_score: See above.
        method: 0 naive, 1 linear, 2 gaussian.
        offset: 0 or 1, added to the sides of the boxes.

    Returns:
        Indices `[K]` of the taken boxes, int64, in the order they were taken.

    Raises:
        ValueError: If `method` is none of the three.
    """
    if method not in (NAIVE, LINEAR, GAUSSIAN):
        raise ValueError(f'softnms: method must be 0 (naive), 1 (linear) or 2 (gaussian), got {method}')
    boxes, scores = widen(boxes, scores)
    every_box = boxes
    areas = _areas(boxes, offset)
    remaining = torch.arange(len(boxes), device=boxes.device)
    taken = []
    taken_scores = []
    while len(remaining):
        best = scores.argmax()
        taken.append(remaining[best])
        taken_scores.append(scores[best])
        shared = _intersections(boxes[best], boxes, offset)
        overlap = (shared / (areas[best] + areas - shared)).nan_to_num_(nan=0.0)
        if method == GAUSSIAN:
            factor = torch.exp(-(overlap * overlap) / sigma)
        else:
            factor = torch.where(overlap >= iou_threshold, 0.0 if method == NAIVE else 1 - overlap, 1.0)
        scores = scores * factor
        stays = scores >= min_score
        stays[best] = False
        boxes, scores, areas, remaining = boxes[stays], scores[stays], areas[stays], remaining[stays]
    if not taken:
        return remaining
    indices = torch.stack(taken)
    dets[: len(indices)] = torch.cat((every_box[indices], torch.stack(taken_scores)[:, None]), dim=1).to(dets)
    return indices


@exact
def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Suppression that remembers what each kept box suppressed.

    Args:
        dets: `[N, 5]`, boxes and scores.
        iou_threshold: A box joins the group of a better one when they overlap by *at least* this (`nms` asks for more
            than this).

    Returns:
        One list of indices per kept box: the box itself, then the boxes it suppressed, by falling score.
    """
    (dets,) = widen(dets)
    remaining = dets[:, 4].argsort(descending=True, stable=True)
    boxes = dets[remaining, :4]
    areas = _areas(boxes, 0)
    groups = []
    while len(remaining):
        shared = _intersections(boxes[0], boxes, 0)
        joins = shared / (areas[0] + areas - shared) >= iou_threshold
        # A box of no area has no overlap with itself (0 / 0), and is the head of its group all the same.
        joins[0] = True
        groups.append(remaining[joins].tolist())
        boxes, areas, remaining = boxes[~joins], areas[~joins], remaining[~joins]
    return groups


@exact
def bbox_overlaps(
    bboxes1: Tensor,
    bboxes2: Tensor,
    ious: Tensor,
    mode: int,
    aligned: bool,
    offset: int = 0,
) -> None:
    """Overlaps of two sets of boxes.

    Args:
        bboxes1: `[M, 4]`.
        bboxes2: `[N, 4]`; N = M when `aligned`.
        ious: Filled: `[M, N]`, or `[M]` when `aligned`. 0 / 0, of two boxes without area, gives NaN as in mmcv's CPU
            kernel.
        mode: 0 divides the intersection by the union, 1 by the area of the box of `bboxes1`.
        aligned: Compare pairs instead of all with all.
        offset: 0 or 1, added to the sides of the boxes.

    Raises:
        ValueError: If `mode` is neither 0 nor 1.
    """
    if mode not in (IOU, IOF):
        raise ValueError(f'bbox_overlaps: mode must be 0 (iou) or 1 (iof), got {mode}')
    boxes1, boxes2 = widen(bboxes1, bboxes2)
    if not aligned:
        boxes1, boxes2 = boxes1[:, None], boxes2[None]
    shared = _intersections(boxes1, boxes2, offset)
    whole = _areas(boxes1, offset)
    if mode == IOU:
        whole = whole + _areas(boxes2, offset) - shared
    ious.copy_(shared / whole)
