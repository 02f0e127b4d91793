"""Every technique with detectors of MMDetection's own configs: works, or refused with the reason.

    python tools/detector_matrix.py                       # the whole table, as it stands in docs/mmdetection.md
    python tools/detector_matrix.py retinanet ssd --only channels,share

The detectors have random weights and see random images, so this is about structure: the technique is applied to the
whole detector, the result is saved and loaded bit for bit, a training step of it gives finite losses and gradients, and
it is exported as ONNX. What it costs in accuracy is not what this shows.
"""
import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm

import timm_lean
import timm_lean.mmdet
from timm_lean import LeanError
from timm_lean.export.forms import save_onnx
from timm_lean.mmdet import lean_detector, load_detector
from timm_lean.mmdet.detector import build_detector, write_detector
from timm_lean.mmdet.on_images import on_images
from timm_lean.mmdet.settings import open_config
from timm_lean.pruning import remove_blocks
from timm_lean.pruning.blocks import find_blocks
from timm_lean.regularizers import loss_terms

DETECTORS = {
    'rtmdet_tiny': 'rtmdet/rtmdet_tiny_8xb32-300e_coco',
    'yolox_tiny': 'yolox/yolox_tiny_8xb8-300e_coco',
    'faster_rcnn_r50': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco',
    'mask_rcnn_r50': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco',
    'retinanet_r18': 'retinanet/retinanet_r18_fpn_1x_coco',
    'fcos_r50': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco',
    'atss_r50': 'atss/atss_r50_fpn_1x_coco',
    'ssd300': 'ssd/ssd300_coco',
    'centernet_r18': 'centernet/centernet_r18_8xb16-crop512-140e_coco',
    'yolov3_mobilenetv2': 'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco',
    'cascade_rcnn_r50': 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco',
    'deformable_detr_r50': 'deformable_detr/deformable-detr_r50_16xb2-50e_coco',
}
TECHNIQUES = ('regularizer', 'kernels', 'share', 'channels', 'blocks', 'export')
_SIDES = {'ssd300': 320}  # it takes no smaller ones
_SIDE = 128


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description='Techniques by detectors of MMDetection.')
    parser.add_argument('detectors', nargs='*', help=f'of {", ".join(DETECTORS)}; all if none')
    parser.add_argument('--only', metavar='TECHNIQUE,...', default=','.join(TECHNIQUES))
    parser.add_argument('-o', '--output', metavar='FILE', help='also append the rows to this .jsonl')
    args = parser.parse_args(argv)
    rows = {}
    for name in args.detectors or DETECTORS:
        start = time.perf_counter()
        rows[name] = try_detector(name, args.only.split(','))
        seconds = time.perf_counter() - start
        print(f'{name}: {json.dumps(rows[name])} ({seconds:.0f} s)', file=sys.stderr, flush=True)
        if args.output:
            with open(args.output, 'a') as f:
                f.write(json.dumps({'detector': name, 'cells': rows[name]}) + '\n')
    print(format_rows(rows))
    return 0


def format_rows(rows: dict[str, dict[str, str]]) -> str:
    """A table in Markdown; reasons are notes below it."""
    names = [name for name in TECHNIQUES if any(name in row for row in rows.values())]
    lines = [f'| | {" | ".join(names)} |', '|---' * (len(names) + 1) + '|']
    notes: list[str] = []
    for detector, row in rows.items():
        cells = []
        for name in names:
            cell = row.get(name, '')
            if cell.startswith('refused'):
                if cell not in notes:
                    notes.append(cell)
                cell = f'refused [{notes.index(cell) + 1}]'
            cells.append(cell)
        lines.append(f'| {detector} | {" | ".join(cells)} |')
    return '\n'.join([*lines, '', *(f'[{i}] {note}' for i, note in enumerate(notes, 1))])


def try_detector(name: str, techniques: Sequence[str] = TECHNIQUES) -> dict[str, str]:
    """What each technique does with a detector: `works`, with the share of parameters left, or `refused: REASON`."""
    cfg = open_config(f'mmdet::{DETECTORS[name]}.py')
    torch.manual_seed(0)
    detector: Any = build_detector(cfg).eval()
    detector.cfg, detector.dataset_meta = cfg, {'classes': [str(i) for i in range(80)]}
    side = _SIDES.get(name, _SIDE)
    ways: dict[str, Callable[[], str]] = {
        'regularizer': lambda: _regularized(detector, side),
        'kernels': lambda: _changed(detector, side, timm_lean.prune_kernels, amount=0.5, scope='layer'),
        'share': lambda: _changed(detector, side, timm_lean.share, shared_rank=16),
        'channels': lambda: _changed(detector, side, timm_lean.prune_channels, pruning_ratio=0.3),
        'blocks': lambda: _changed(detector, side, remove_blocks, blocks=[_a_block(detector, side)]),
        'export': lambda: _exported(detector, side),
    }
    cells = {}
    for technique in techniques:
        try:
            cells[technique] = ways[technique]()
        except LeanError as e:
            cells[technique] = f'refused: {" ".join(str(e).split())}'
    return cells


def _changed(detector: Any, side: int, verb: Callable[..., Any], **options: Any) -> str:
    """Apply, save, load bit for bit, and take a training step."""
    new = lean_detector(detector, verb, image_size=side, **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'd.safetensors'
        write_detector(new, path)
        again = load_detector(path)
    expected, found = new.state_dict(), again.state_dict()
    if expected.keys() != found.keys() or not all(torch.equal(expected[key], found[key]) for key in expected):
        raise RuntimeError('The file does not give the detector back.')
    _train_step(again, side)
    before, after = new.lean_report.params
    return f'works, {after / before:.2f}' if after != before else 'works'


def _a_block(detector: Any, side: int) -> str:
    with on_images(detector, 'backbone'):
        names = find_blocks(detector, torch.zeros(1, 3, side, side))
    if not names:
        raise LeanError(f'The backbone {type(detector.backbone).__name__} has no residual block whose input and output '
                        'have one shape.')
    return names[-1]


def _regularized(detector: Any, side: int) -> str:
    regularizer = timm_lean.create_regularizer('conv_similarity', weight=1e-4)
    _train_step(copy.deepcopy(detector), side, lambda model: loss_terms([regularizer], model))
    return 'works'


def _exported(detector: Any, side: int) -> str:
    from mmdet.models.detectors import DetectionTransformer, TwoStageDetector

    from timm_lean.mmdet.export import graph_of
    part = 'features' if isinstance(detector, DetectionTransformer) else 'whole'
    with tempfile.TemporaryDirectory() as folder:
        error = save_onnx(graph_of(detector, part), torch.randn(2, 3, side, side), Path(folder) / 'd.onnx')
    kind = 'features' if part == 'features' else 'first stage' if isinstance(detector, TwoStageDetector) else 'whole'
    return f'{kind}, within {error:.0e}'


def _train_step(model: Any, side: int, terms: Callable[[Any], dict[str, torch.Tensor]] = lambda model: {}) -> None:
    """Losses of a random batch and their gradients; RuntimeError if they are not finite."""
    hub = MessageHub.get_current_instance()
    for key in ('iter', 'epoch', 'max_iters', 'max_epochs'):  # which some heads ask for
        hub.update_info(key, 1)
    model = revert_sync_batchnorm(model).train()  # as MMEngine does in one process
    data = model.data_preprocessor(_batch(side), training=True)
    losses = {**model(**data, mode='loss'), **terms(model)}
    total, _ = model.parse_losses(losses)
    total.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    if not found or not bool(torch.isfinite(total)) or not all(bool(grad.isfinite().all()) for grad in found):
        raise RuntimeError('Losses or gradients are not finite.')


def _batch(side: int) -> dict[str, list[Any]]:
    """Two random images with two boxes and masks each."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData
    rng = np.random.default_rng(0)
    inputs, samples = [], []
    for _ in range(2):
        low = rng.uniform(0, side * 0.4, (2, 2))
        boxes = np.concatenate([low, low + rng.uniform(side * 0.25, side * 0.55, (2, 2))], 1).astype(np.float32)
        masks = np.zeros((2, side, side), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
            mask[y1:y2, x1:x2] = 1
        size = (side, side)
        sample = DetDataSample(metainfo=dict(
            img_shape=size, ori_shape=size, batch_input_shape=size, pad_shape=size, scale_factor=(1., 1.), img_id=0,
            img_path='', flip=False))
        sample.gt_instances = InstanceData(
            bboxes=torch.from_numpy(boxes), labels=torch.from_numpy(rng.integers(0, 80, 2)),
            masks=BitmapMasks(masks, side, side))
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        inputs.append(torch.from_numpy(rng.integers(0, 256, (3, side, side), dtype=np.uint8)))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


if __name__ == '__main__':
    sys.exit(main())
