"""A one-stage detector with its selection of boxes (least score, the best of each level, NMS) as a graph.

MMDetection's heads select by masks, so that the lengths of most tensors depend on the image, which exporters do not
follow through the decoding of boxes. Here a head runs its own code, but with a selection that gives the same boxes and
can be exported: lengths are fixed up to the end of the decoding, what was not selected has a score below zero, and
only then is it left out, right before `torchvision.ops.nms`, which is `NonMaxSuppression` in ONNX.
"""
import contextlib
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn as nn
from mmdet.models.dense_heads import YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.detectors import SingleStageDetector
from torchvision.ops import nms

from timm_lean.checkpoint.files import atomic_file
from timm_lean.errors import LeanError
from timm_lean.export.forms import exporting, onnx_form, torch_export_form
from timm_lean.export.table import Form

from .on_images import image_samples

__all__ = ['NAMES', 'Boxes', 'own_boxes', 'select_boxes', 'write_boxes']

NAMES = ('boxes', 'scores', 'labels')
Boxes = Sequence[torch.Tensor]
"""`[N, 4]` (x1, y1, x2, y2 in pixels), `[N]`, `[N]`: best first."""

_TOLERANCE = 1e-3  # of a score, and of the image's side
_ALIKE = 0.99  # a score next to a threshold may fall on its other side


def select_boxes(detector: Any, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """The boxes that a one-stage detector finds in one image `[1, 3, H, W]`, in a way that can be exported."""
    with _exportable(detector.bbox_head) as head:
        found, = head.predict(detector.extract_feat(image), image_samples(image), rescale=False)
    return {'boxes': found.bboxes, 'scores': found.scores, 'labels': found.labels}


@torch.no_grad()
def own_boxes(source: str | Path, detector: Any, images: torch.Tensor) -> list[Boxes]:
    """The boxes that MMDetection finds in each of some images `[B, 3, H, W]`.

    Raises:
        LeanError: The head has a selection that `select_boxes` does not know, or there is no box in any of the images.
    """
    head = getattr(detector, 'bbox_head', None)
    why = ''
    if not isinstance(detector, SingleStageDetector) or not isinstance(head, BaseDenseHead):
        why = 'it is no detector of one stage that finds boxes alone'
    elif type(head)._bbox_post_process not in (BaseDenseHead._bbox_post_process, YOLOXHead._bbox_post_process):
        why = f'its {type(head).__name__} selects boxes in a way of its own'
    elif (kind := _nms_of(head.test_cfg).get('type', 'nms')) != 'nms':
        why = f'its test_cfg has {kind} where ONNX has plain nms only'
    if why:
        raise LeanError(f'{source} is a {type(detector).__name__}, which cannot be exported with its boxes: {why}. '
                        'Export what is before them: --part whole or features.')
    found: list[Boxes] = []
    for image in images.split(1):
        sample, = detector.predict(image, image_samples(image), rescale=False)
        found.append((sample.pred_instances.bboxes, sample.pred_instances.scores, sample.pred_instances.labels))
    if not any(map(_count, found)):
        raise LeanError(f'{source} finds no box in the {len(images)} images that its boxes are to be checked on. Give '
                        'images of the kind it is for: --data-dir DIR (data_dir=DIR).')
    return found


def write_boxes(
        graph: nn.Module, images: torch.Tensor, expected: Sequence[Boxes], *,
        onnx: str | Path | None = None, torch_export: str | Path | None = None,
) -> list[Form]:
    """Write a graph of `select_boxes` as ONNX and by torch.export, for one image, each checked before it is written.

    Args:
        graph: From an image `[1, 3, H, W]` to `NAMES`, on the CPU.
        images: `[B, 3, H, W]`.
        expected: The boxes in each of them.
        onnx: The `.onnx` file to write.
        torch_export: The `.pt2` file to write.

    Raises:
        LeanError: The graph cannot be exported, or a form of it finds other boxes.
    """
    side = images.shape[-1]
    with exporting('The selection of boxes'), torch.no_grad():
        found = [graph(image) for image in images.split(1)]
    _compare('The graph', expected, found, side)
    with exporting('torch.export'), torch.no_grad():  # before ONNX, in whose own export mmdet calls what it has not
        program = torch.export.export(graph, (images[:1],), strict=False)
    written = []
    for path, as_bytes, load in ((onnx, _onnx, onnx_form), (torch_export, _pt2, torch_export_form)):
        if path:
            data = as_bytes(program)
            form = load(data)
            alike = _compare(f'The {Path(path).suffix} form', expected, [form(i) for i in images.split(1)], side)
            note = f'{path}: {alike} on {len(images)} images'
            written.append((path, data, Form(str(path), len(data), form, note=note)))
    for path, data, _ in written:  # both have been checked
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
    return [form for *_, form in written]


def _onnx(program: torch.export.ExportedProgram) -> bytes:
    with exporting('ONNX'):
        written = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=['images'], output_names=list(NAMES))
        assert written is not None
        return written.model_proto.SerializeToString()


def _pt2(program: torch.export.ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    with exporting('torch.export'):
        torch.export.save(program, buffer)
    return buffer.getvalue()


@contextlib.contextmanager
def _exportable(head: Any) -> Iterator[Any]:
    """Within, a head selects boxes so that it can be exported."""
    ours = {'filter_scores_and_topk': _best, 'InstanceData': SimpleNamespace}  # which asks for lengths as numbers
    modules = dict.fromkeys(sys.modules[kind.__module__] for kind in type(head).__mro__)
    theirs = [(module, name, getattr(module, name)) for module in modules for name in ours if hasattr(module, name)]
    try:
        for module, name, _ in theirs:
            setattr(module, name, ours[name])
        head._bbox_post_process = _suppress
        yield head
    finally:
        head.__dict__.pop('_bbox_post_process', None)
        for module, name, value in theirs:
            setattr(module, name, value)


def _best(
        scores: torch.Tensor, score_thr: float, topk: int, results: Mapping[str, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor] | None]:
    """`filter_scores_and_topk` of MMDetection with as many results for every image.

    Args:
        scores: `[N, classes]`.
        score_thr: Scores up to it become -1.
        topk: How many to keep, if there are as many; all if not above 0.
        results: Tensors `[N, ...]` to take the same places from.

    Returns:
        Scores, classes and places `[K]`, the best first, and what is at those places.
    """
    flat = torch.where(scores > score_thr, scores, -1.).flatten()
    values, order = flat.topk(min(topk, len(flat)) if topk > 0 else len(flat))
    places, labels = order // scores.shape[1], order % scores.shape[1]
    return values, labels, places, None if results is None else {name: x[places] for name, x in results.items()}


def _suppress(
        results: Any, cfg: Any, rescale: bool = False, with_nms: bool = True, img_meta: Any = None) -> SimpleNamespace:
    """What MMDetection does to the decoded boxes of an image at last: a least size, NMS per class, the best of them."""
    boxes, scores, labels = results.bboxes, results.scores, results.labels
    if hasattr(results, 'score_factors'):
        scores = scores * results.score_factors
    valid = scores > 0
    if cfg.get('min_bbox_size', -1) >= 0:
        valid &= (boxes[:, 2:] - boxes[:, :2] > cfg.min_bbox_size).all(1)
    kept = valid.nonzero()[:, 0]
    boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
    suppression = _nms_of(cfg)
    places = boxes  # classes apart from each other, as far as mmcv puts them
    if not suppression.get('class_agnostic'):
        furthest = torch.cat((boxes.flatten(), boxes.new_zeros(1))).max()  # there may be no box
        places = boxes + (labels.to(boxes) * (furthest + 1))[:, None]
    kept = nms(places, scores, suppression['iou_threshold'])
    if limit := cfg.get('max_per_img'):
        kept = kept[(torch.arange(kept.shape[0], device=kept.device) < limit).nonzero()[:, 0]]
    return SimpleNamespace(bboxes=boxes[kept], scores=scores[kept], labels=labels[kept])


def _nms_of(cfg: Any) -> Any:
    return (cfg or {}).get('nms') or {}


def _compare(who: str, expected: Sequence[Boxes], found: Sequence[Boxes], side: int) -> str:
    """How well boxes found in some images agree with those expected; a LeanError if they do not."""
    pairs = [_distances(e, f, side) for e, f in zip(expected, found, strict=True)]
    off, back = (torch.cat(distances) for distances in zip(*pairs, strict=True))
    near = off[off.isfinite()]
    alike = f"{len(near):,} of MMDetection's {len(off):,} boxes"
    if min(len(near), int(back.isfinite().sum())) < _ALIKE * max(len(off), len(back)):
        raise LeanError(f'{who} finds {len(back):,} boxes, {alike} among them; nothing was written. Export what is '
                        'before them: --part whole.')
    return f'{alike}, within {near.max():.1e} pixels'


def _distances(first: Boxes, second: Boxes, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels from each box to the nearest one of the other list with its class and its score, infinite if there is
    none, for both lists."""
    if not _count(first) or not _count(second):
        return torch.full_like(first[1], torch.inf), torch.full_like(second[1], torch.inf)
    off = (first[0][:, None] - second[0]).abs().amax(2)
    other = (first[2][:, None] != second[2]) | ((first[1][:, None] - second[1]).abs() > _TOLERANCE)
    off = off.masked_fill(other | (off > _TOLERANCE * side), torch.inf)
    return off.amin(1), off.amin(0)


def _count(boxes: Boxes) -> int:
    return len(boxes[1])
