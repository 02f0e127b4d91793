"""Every technique with detectors of MMDetection's own configs: works, or refused with the reason.

    python tools/detector_matrix.py -o rows.jsonl         # goes on where it was: what has a row is not tried again
    python tools/detector_matrix.py -o rows.jsonl --write docs/validation.md
    python tools/detector_matrix.py retinanet_r18 ssd300 --only channels,share

The detectors have random weights and see random images, so this is about structure: the technique is applied to the
whole detector, the file of the result gives back the same tensors and the same outputs, and a training step of what was
loaded gives finite losses and gradients. `export` is ONNX, run by onnxruntime, of the detector and of the one that the
channels went from. What it costs in accuracy is not what this shows.
"""
import argparse
import copy
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm

import timm_lean
import timm_lean.mmdet
from timm_lean import LeanError
from timm_lean.export.forms import save_onnx
from timm_lean.mmdet import lean_detector, load_detector
from timm_lean.mmdet.detector import build_detector, write_detector
from timm_lean.mmdet.export import graph_of
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
CRASHED = 'crashed: '
_MARKS = ('<!-- detector matrix -->', '<!-- end of detector matrix -->')
_SIDES = {'ssd300': 320}  # it takes no smaller ones
_SIDE = 128


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description='Techniques by detectors of MMDetection.')
    parser.add_argument('detectors', nargs='*', help=f'of {", ".join(DETECTORS)}; all if none')
    parser.add_argument('--only', metavar='TECHNIQUE,...', default=','.join(TECHNIQUES))
    parser.add_argument('-o', '--output', metavar='FILE', help='keep the cells in this .jsonl, and take what it has')
    parser.add_argument('--write', metavar='FILE', help='put the table into this page, between its two marks')
    args = parser.parse_args(argv)
    rows = _read_cells(args.output) if args.output else {}
    wanted = args.only.split(',')
    for name in args.detectors or DETECTORS:
        row = rows.setdefault(name, {})
        left = [technique for technique in wanted if technique not in row]
        for technique, cell in try_detector(name, left, stop=False) if left else ():
            row[technique] = cell
            print(f'{name} {technique}: {cell}', file=sys.stderr, flush=True)
            if args.output:
                with open(args.output, 'a') as f:
                    f.write(json.dumps({'detector': name, 'technique': technique, 'cell': cell}) + '\n')
    table = format_rows({name: rows[name] for name in DETECTORS if rows.get(name)})
    print(table)
    if args.write:
        _write(Path(args.write), table)
    return int(any(cell.startswith(CRASHED) for row in rows.values() for cell in row.values()))


def _read_cells(path: str) -> dict[str, dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    for line in Path(path).read_text().splitlines() if Path(path).is_file() else []:
        entry = json.loads(line)
        if not entry['cell'].startswith(CRASHED):
            rows.setdefault(entry['detector'], {})[entry['technique']] = entry['cell']
    return rows


def _write(page: Path, table: str) -> None:
    """Put the table between the marks of a page."""
    before, start, rest = page.read_text().partition(_MARKS[0])
    _, end, after = rest.partition(_MARKS[1])
    if not start or not end:
        raise SystemExit(f'{page} does not have the lines {_MARKS[0]} and {_MARKS[1]}.')
    page.write_text(f'{before}{start}\n{table}\n{end}{after}')


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


def try_detector(
        name: str, techniques: Sequence[str] = TECHNIQUES, stop: bool = True) -> Iterator[tuple[str, str]]:
    """What each technique does with a detector, one after the other.

    Args:
        name: Of `DETECTORS`.
        techniques: Which.
        stop: Let what is no LeanError through; else it makes a cell `crashed: ...`.

    Yields:
        The technique, and `works` with the share of parameters left, or `refused: REASON`.
    """
    detector = new_detector(DETECTORS[name])
    side = _SIDES.get(name, _SIDE)
    ways: dict[str, Callable[[], str]] = {
        'regularizer': lambda: _regularized(detector, side),
        'kernels': lambda: _changed(detector, side, timm_lean.prune_kernels, amount=0.5, scope='layer'),
        'share': lambda: _changed(detector, side, timm_lean.share, params=0.5),
        'channels': lambda: _changed(detector, side, timm_lean.prune_channels, pruning_ratio=0.3),
        'blocks': lambda: _changed(detector, side, remove_blocks, blocks=[_a_block(detector, side)]),
        'export': lambda: _exported(detector, side),
    }
    for technique in techniques:
        start = time.perf_counter()
        try:
            cell = ways[technique]()
        except LeanError as e:
            cell = f'refused: {" ".join(str(e).split())}'
        except Exception as e:
            if stop:
                raise
            traceback.print_exc()
            cell = f'{CRASHED}{type(e).__name__}: {" ".join(str(e).split())[:200]}'
        print(f'{name} {technique}: {time.perf_counter() - start:.0f} s', file=sys.stderr, flush=True)
        yield technique, cell


@torch.no_grad()
def new_detector(config: str) -> Any:
    """A detector of MMDetection's own config, such as `ssd/ssd300_coco`, with random weights, in eval mode.

    Its batch norms have weights and statistics other than those of new ones, as after training.
    """
    cfg = open_config(f'mmdet::{config}.py')
    cfg.model.backbone.init_cfg = None  # nothing is downloaded
    torch.manual_seed(0)
    detector: Any = build_detector(cfg).eval()
    detector.init_weights()  # until then parameters of SSD and Deformable DETR are whatever memory held
    generator = torch.Generator().manual_seed(0)
    for module in detector.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.weight.uniform_(0.5, 1.5, generator=generator)
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)  # type: ignore[union-attr]
    detector.cfg, detector.dataset_meta = cfg, {'classes': [str(i) for i in range(80)]}
    return detector


def _changed(detector: Any, side: int, verb: Callable[..., Any], **options: Any) -> str:
    """Apply, save, load with equal tensors and outputs, and take a training step."""
    new = lean_detector(detector, verb, image_size=side, **options)
    again = _reloaded(new)
    expected, found = new.state_dict(), again.state_dict()
    if expected.keys() != found.keys() or not all(torch.equal(expected[key], found[key]) for key in expected):
        raise RuntimeError('The file does not give the detector back.')
    x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    for before, after in zip(_outputs(new, x), _outputs(again, x), strict=True):
        if not torch.equal(before, after) or not bool(after.isfinite().all()):
            raise RuntimeError('The detector from the file gives other outputs.')
    _train_step(again, side)
    old, left = new.lean_report.params
    return f'works, {left / old:.2f}' if left != old else 'works'


def _reloaded(detector: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'd.safetensors'
        write_detector(detector, path)
        return load_detector(path)


@torch.no_grad()
def _outputs(detector: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """What a detector gives before boxes are selected."""
    with on_images(detector.eval(), _most(detector)):
        return detector(x)


def _most(detector: Any) -> str:
    """The most of a detector that is a function of images alone."""
    from mmdet.models.detectors import DetectionTransformer  # not before the stand-in for compiled mmcv
    return 'features' if isinstance(detector, DetectionTransformer) else 'whole'


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
    from mmdet.models.detectors import TwoStageDetector
    part = _most(detector)
    pruned = _reloaded(lean_detector(detector, timm_lean.prune_channels, pruning_ratio=0.3, image_size=side))
    with tempfile.TemporaryDirectory() as folder:
        error = max(save_onnx(graph_of(each, part), torch.randn(2, 3, side, side), Path(folder) / 'd.onnx')
                    for each in (detector, pruned))
    kind = 'features' if part == 'features' else 'first stage' if isinstance(detector, TwoStageDetector) else 'whole'
    return f'{kind}, within {error:.0e}'


def _train_step(model: Any, side: int, terms: Callable[[Any], dict[str, torch.Tensor]] = lambda model: {}) -> None:
    """Losses of a random batch and their gradients; RuntimeError if they are not finite."""
    masks = bool(getattr(model, 'with_mask', False))
    hub = MessageHub.get_current_instance()
    for key in ('iter', 'epoch', 'max_iters', 'max_epochs'):  # which some heads ask for
        hub.update_info(key, 1)
    model = revert_sync_batchnorm(model).train()  # as MMEngine does in one process
    data = model.data_preprocessor(_batch(side, masks), training=True)
    losses = {**model(**data, mode='loss'), **terms(model)}
    total, _ = model.parse_losses(losses)
    total.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    if not found or not bool(torch.isfinite(total)) or not all(bool(grad.isfinite().all()) for grad in found):
        raise RuntimeError('Losses or gradients are not finite.')


def _batch(side: int, with_masks: bool) -> dict[str, list[Any]]:
    """Two random images with two boxes each."""
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
            bboxes=torch.from_numpy(boxes), labels=torch.from_numpy(rng.integers(0, 80, 2)))
        if with_masks:
            sample.gt_instances.masks = BitmapMasks(masks, side, side)
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        inputs.append(torch.from_numpy(rng.integers(0, 256, (3, side, side), dtype=np.uint8)))
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)


if __name__ == '__main__':
    sys.exit(main())
