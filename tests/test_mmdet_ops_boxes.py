"""The stand-in's box operators, against definitions written out one box at a time, and against torchvision."""

# ruff: noqa: E402  (the stand-in has to be in place before anything imports mmcv.ops)
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_lean import mmcv_ext as ops

pytest.importorskip('mmcv')
ops.install()

import mmcv.ops
from mmcv import _ext

HALF = [torch.float16, torch.bfloat16]


def iou_of(a, b, offset: int, of_first: bool = False) -> float:
    """Overlap of two boxes, by the definition; NaN for 0 / 0."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0.0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0.0)
    area_a, area_b = ((c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b))
    whole = area_a if of_first else area_a + area_b - width * height
    return width * height / whole if whole else math.nan


@st.composite
def boxes_and_scores(draw, max_boxes: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes on a quarter-pixel grid, zero sides included, and scores that are all different."""
    count = draw(st.integers(1, max_boxes))
    quarter = st.integers(0, 40)
    rows = [[draw(quarter) / 4 for _ in range(4)] for _ in range(count)]
    boxes = torch.tensor([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in rows], dtype=torch.float64)
    scores = torch.tensor(draw(st.permutations(range(1, count + 1))), dtype=torch.float64) / (count + 1)
    return boxes, scores


thresholds = st.sampled_from([0.1, 0.3, 0.5, 0.7])
offsets = st.sampled_from([0, 1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(boxes_and_scores(), thresholds, offsets)
def test_nms_keeps_what_the_definition_keeps(case, threshold, offset) -> None:
    boxes, scores = case
    kept: list[int] = []
    for i in scores.argsort(descending=True).tolist():
        if not any(iou_of(boxes[i].tolist(), boxes[j].tolist(), offset) > threshold for j in kept):
            kept.append(i)
    dets, indices = mmcv.ops.nms(boxes, scores, threshold, offset=offset)
    assert indices.tolist() == kept
    torch.testing.assert_close(dets, torch.cat((boxes, scores[:, None]), 1)[kept])


def naive_soft_nms(boxes, scores, threshold, sigma, min_score, method, offset):
    """Soft-NMS by its definition, a box at a time."""
    left = [(score, i) for i, score in enumerate(scores)]
    result = []
    while left:
        best = max(left, key=lambda item: item[0])
        left.remove(best)
        result.append((best[1], best[0]))
        lowered = []
        for score, i in left:
            overlap = iou_of(boxes[best[1]], boxes[i], offset)
            overlap = 0.0 if math.isnan(overlap) else overlap
            if method == 'gaussian':
                score = score * math.exp(-(overlap**2) / sigma)
            elif overlap >= threshold:
                score = 0.0 if method == 'naive' else score * (1 - overlap)
            if score >= min_score:
                lowered.append((score, i))
        left = lowered
    return result


@settings(max_examples=60, deadline=None, derandomize=True)
@given(boxes_and_scores(), thresholds, offsets, st.sampled_from(['naive', 'linear', 'gaussian']))
def test_soft_nms_is_the_definition(case, threshold, offset, method) -> None:
    boxes, scores = case
    expected = naive_soft_nms(boxes.tolist(), scores.tolist(), threshold, 0.5, 0.05, method, offset)
    dets, indices = mmcv.ops.soft_nms(boxes, scores, threshold, 0.5, 0.05, method, offset)
    # Lowered scores may tie, where any order is right: compare box by box, and the order of the scores.
    assert sorted(indices.tolist()) == sorted(i for i, _ in expected)
    assert dets[1:, 4].tolist() == sorted(dets[1:, 4].tolist(), reverse=True)
    by_index = dict(expected)
    for row, i in zip(dets, indices.tolist(), strict=True):
        assert row[4].item() == pytest.approx(by_index[i], abs=1e-12)
        torch.testing.assert_close(row[:4], boxes[i])


def test_soft_nms_takes_the_first_box_whatever_its_score_and_numpy() -> None:
    boxes = np.array([[0, 0, 10, 10], [50, 50, 60, 60]], dtype=np.float32)
    dets, indices = mmcv.ops.soft_nms(boxes, np.array([0.001, 0.0005], dtype=np.float32), min_score=0.01)
    assert indices.tolist() == [0] and dets.shape == (1, 5) and dets.dtype == np.float32
    dets, indices = mmcv.ops.soft_nms(np.zeros((0, 4), np.float32), np.zeros(0, np.float32))
    assert dets.shape == (0, 5) and indices.shape == (0,)


def test_documented_examples_of_mmcv() -> None:
    boxes = np.array([[4, 3, 5, 3], [4, 3, 5, 4], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1], [3, 1, 3, 1]], np.float32)
    dets, indices = mmcv.ops.soft_nms(boxes, np.array([0.9, 0.9, 0.5, 0.5, 0.4, 0.0], np.float32), 0.6, sigma=0.5)
    assert len(indices) == len(dets) == 5
    boxes = np.array(
        [
            [49.1, 32.4, 51.0, 35.9], [49.3, 32.9, 51.0, 35.3], [49.2, 31.8, 51.0, 35.4], [35.1, 11.5, 39.1, 15.7],
            [35.6, 11.8, 39.3, 14.2], [35.3, 11.5, 39.9, 14.5], [35.2, 11.7, 39.7, 15.7],
        ],
        dtype=np.float32,
    )  # fmt: skip
    dets, indices = mmcv.ops.nms(boxes, np.array([0.9, 0.9, 0.5, 0.5, 0.5, 0.4, 0.3], np.float32), 0.6)
    assert len(indices) == len(dets) == 3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(boxes_and_scores(), thresholds)
def test_nms_match_partitions_the_boxes(case, threshold) -> None:
    boxes, scores = case
    groups = [group.tolist() for group in mmcv.ops.nms_match(torch.cat((boxes, scores[:, None]), 1), threshold)]
    assert sorted(i for group in groups for i in group) == list(range(len(boxes)))
    heads = [group[0] for group in groups]
    assert heads == sorted(heads, key=lambda i: -scores[i])
    for number, group in enumerate(groups):
        assert group == sorted(group, key=lambda i: -scores[i])
        for i in group[1:]:
            # Its own head is the first one that reaches the threshold.
            reached = [iou_of(boxes[head].tolist(), boxes[i].tolist(), 0) >= threshold for head in heads]
            assert reached.index(True) == number
        assert not any(iou_of(boxes[h].tolist(), boxes[group[0]].tolist(), 0) >= threshold for h in heads[:number])
    assert mmcv.ops.nms_match(torch.zeros(0, 5), threshold) == []


@settings(max_examples=60, deadline=None, derandomize=True)
@given(boxes_and_scores(6), boxes_and_scores(6), offsets, st.sampled_from(['iou', 'iof']), st.booleans())
def test_bbox_overlaps_is_the_definition(case1, case2, offset, mode, aligned) -> None:
    first, second = case1[0], case2[0]
    if aligned:
        count = min(len(first), len(second))
        first, second = first[:count], second[:count]
    found = mmcv.ops.bbox_overlaps(first, second, mode=mode, aligned=aligned, offset=offset)
    pairs = list(zip(first, second, strict=True)) if aligned else [(a, b) for a in first for b in second]
    expected = torch.tensor([iou_of(a.tolist(), b.tolist(), offset, mode == 'iof') for a, b in pairs])
    torch.testing.assert_close(found, expected.to(found).view(found.shape), equal_nan=True)
    if mode == 'iou':
        assert ((found >= 0) & (found <= 1 + 1e-12) | found.isnan()).all()


def test_overlap_equal_to_the_threshold_and_boxes_without_area() -> None:
    boxes, scores = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 4]]), torch.tensor([0.9, 0.8])
    assert mmcv.ops.nms(boxes, scores, 0.5)[1].tolist() == [0, 1]
    assert len(mmcv.ops.nms_match(torch.cat((boxes, scores[:, None]), 1), 0.5)) == 1
    dets, _ = mmcv.ops.soft_nms(boxes, scores, 0.5, method='linear')
    torch.testing.assert_close(dets[:, 4], torch.tensor([0.9, 0.4]))
    for method in ('naive', 'linear', 'gaussian'):
        dets, _ = mmcv.ops.soft_nms(torch.ones(2, 4), scores, 0.5, method=method)
        torch.testing.assert_close(dets[:, 4], scores)


def test_bbox_overlaps_agrees_with_torchvision() -> None:
    boxes = torch.rand(2, 40, 4) * 50
    boxes[..., 2:] += boxes[..., :2]
    torch.testing.assert_close(mmcv.ops.bbox_overlaps(boxes[0], boxes[1]), torchvision.ops.box_iou(boxes[0], boxes[1]))


def test_nms_agrees_with_torchvision_on_many_boxes_and_ties() -> None:
    corners = torch.rand(500, 2) * 100
    boxes = torch.cat((corners, corners + 5 + torch.rand(500, 2) * 30), dim=1)
    scores = (torch.rand(500) * 50).round() / 50
    for threshold in (0.0, 0.5, 0.99):
        expected = torchvision.ops.nms(boxes, scores, threshold)
        assert mmcv.ops.nms(boxes, scores, threshold)[1].tolist() == expected.tolist()


@pytest.mark.parametrize('dtype', HALF)
def test_boxes_in_half_precision(dtype) -> None:
    boxes = torch.tensor([[0, 0, 8, 8], [0, 0, 8, 7], [16, 16, 24, 24]], dtype=dtype)
    scores = torch.tensor([0.5, 0.75, 0.25], dtype=dtype)
    dets, indices = mmcv.ops.nms(boxes, scores, 0.5)
    assert indices.tolist() == [1, 2] and dets.dtype == dtype
    dets, indices = mmcv.ops.soft_nms(boxes, scores, 0.5, min_score=0.1, method='naive')
    assert indices.tolist() == [1, 2] and dets.dtype == dtype
    overlaps = mmcv.ops.bbox_overlaps(boxes, boxes)
    assert overlaps.dtype == dtype and overlaps[0, 1] == torch.tensor(7 / 8, dtype=dtype)
    groups = mmcv.ops.nms_match(torch.cat((boxes, scores[:, None]), 1), 0.5)
    assert [group.tolist() for group in groups] == [[1, 0], [2]]


def test_batched_nms_keeps_classes_apart_and_empty_input() -> None:
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 8], [0, 0, 8, 8]])
    scores, classes = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0, 1, 0])
    dets, keep = mmcv.ops.batched_nms(boxes, scores, classes, dict(type='nms', iou_threshold=0.5))
    assert keep.tolist() == [0, 1] and dets.shape == (2, 5)
    dets, keep = mmcv.ops.batched_nms(boxes, scores, classes, dict(type='soft_nms', iou_threshold=0.5, min_score=0.05))
    assert keep.tolist() == [0, 1]
    dets, keep = mmcv.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5) and keep.shape == (0,)


def test_wrong_modes_are_refused() -> None:
    boxes = torch.rand(2, 4)
    with pytest.raises(ValueError, match=r'method must be 0 .* got 3'):
        _ext.softnms(boxes, boxes[:, 0], torch.empty(2, 5), 0.5, 0.5, 0.1, 3, 0)
    with pytest.raises(ValueError, match=r'mode must be 0 .* got 2'):
        _ext.bbox_overlaps(boxes, boxes, torch.empty(2, 2), 2, False, 0)
