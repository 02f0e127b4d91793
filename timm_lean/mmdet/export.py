"""Detectors as ONNX and torch.export files for other runtimes: boxes, the tensors of their heads, features, or less.

The selection of boxes (NMS) of a one-stage detector can be in the files (`boxes.py`); as a rule they end before it.
The second stage of a two-stage detector looks at boxes that the first one selects, so there the graph ends with the
first.
"""
import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from mmdet.models.detectors import DetectionTransformer, TwoStageDetector
from PIL import Image

from timm_lean.errors import LeanError
from timm_lean.export.auto import fold_as_asked
from timm_lean.export.table import Form, format_forms, time_forms, write_forms

from .boxes import own_boxes, select_boxes, write_boxes
from .detector import open_detector
from .on_images import PARTS
from .predict import read_image
from .scenes import write_scenes

__all__ = ['DetectorForms', 'export_forms', 'graph_of']

_CHECK_IMAGES = 8
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp')
_PARTS = (*PARTS, 'boxes')
IMG_SIZE = 320


@dataclass(frozen=True)
class DetectorForms:
    """What `export_forms` wrote; `str()` says it.

    Attributes:
        outputs: Name of every output, its stride (0 if it is no map) and its channels; of boxes, how many have no
            number, nothing.
        forms: The same part in PyTorch, then the files.
        times: Milliseconds of each.
        shape: `[1, 3, H, W]`, the input of the latencies in the table.
        notes: What was folded, and what is not in the files.
    """
    outputs: tuple[tuple[str, int, int], ...]
    forms: list[Form]
    times: list[float]
    shape: tuple[int, int, int, int]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        outputs = ', '.join(
            f'{name}: ' + (f'stride {stride}, ' if stride else '') + f'{channels} channels'
            for name, stride, channels in self.outputs)
        outputs = outputs or 'boxes [N, 4] (x1, y1, x2, y2 in pixels of the input), scores [N], labels [N]'
        notes = [*self.notes, *(form.note for form in self.forms), f'outputs: {outputs}']
        return '\n'.join([*filter(None, notes), format_forms(self.forms, self.times, self.shape)])


def export_forms(
        source: str | Path,
        *,
        config: str | Path | None = None,
        part: str = 'whole',
        onnx: str | Path | None = None,
        torch_export: str | Path | None = None,
        fold: str | None = None,
        img_size: int = IMG_SIZE,
        data_dir: str | Path | None = None,
        device: torch.device | str = 'cpu',
        trust_imports: Sequence[str] = (),
) -> DetectorForms:
    """Write a trained detector in other forms, each checked against PyTorch on real images.

    The input is an image batch as the detector's preprocessor normalizes it.

    Args:
        source: A file of `SafetensorsHook`, a folder of `export_detector`, or a `.pth` with its `config`.
        config: The detector's config, if the source does not say it.
        part: 'whole': what the heads of a one-stage detector give, `head_<i>_level_<j>` the i-th of their outputs; of
            two stages features and region proposals before their selection. 'features': the neck's outputs `level_<j>`
            (the backbone's if there is no neck). 'backbone': the backbone's. 'boxes': the `boxes`, `scores` and
            `labels` that a one-stage detector finds in one image, selected as its `test_cfg` says.
        onnx: The `.onnx` file to write.
        torch_export: The `.pt2` file to write.
        fold: Fold shared bases first: 'all' of them, or 'auto', those that are faster dense on `device`.
        img_size: Side of the images it is checked and timed on, in pixels.
        data_dir: Images to check with; the embedded scenes if None.
        device: Where the detector in PyTorch is timed.
        trust_imports: See `load_detector`.

    Raises:
        LeanError: Not a detector, one whose head cannot be exported, too few images, or a form that computes something
            else.
    """
    if part not in _PARTS:
        raise LeanError(f'part must be one of {", ".join(_PARTS)}, got {part!r}.')
    detector: Any = open_detector(source, config, trust_imports=trust_imports)
    if part == 'whole' and isinstance(detector, DetectionTransformer):
        raise LeanError(f'{source}: the head of a {type(detector).__name__} reads the sizes of its images, which is no '
                        "graph of images alone. Its features can be exported: --part features (part='features').")
    device, cpu = torch.device(device), torch.device('cpu')
    images = _normalized(_images(data_dir, img_size), detector.data_preprocessor)
    shape = (1, *images.shape[1:])
    boxes = own_boxes(source, detector, images) if part == 'boxes' else None
    graph: nn.Module = _Graph(detector, part).eval()
    tensors = {}
    if boxes is None:
        with torch.no_grad():
            tensors = graph(images[:1])
    outputs = tuple((name, shape[2] // tensor.shape[2] if tensor.ndim == 4 else 0, tensor.shape[1])
                    for name, tensor in tensors.items())
    first = Form.of_file(source, graph, device, f'{part} of {source}')
    graph, folded = fold_as_asked(graph, fold, shape, device)
    unnamed = _Unnamed(graph).to(cpu).eval()
    if boxes is None:
        written = write_forms(unnamed, images, onnx=onnx, torch_export=torch_export, names=list(tensors))
    else:
        written = write_boxes(unnamed, images, boxes, onnx=onnx, torch_export=torch_export)
    forms = [first, *written]
    note = ''
    if part == 'whole' and isinstance(detector, TwoStageDetector):
        note = 'two stages: backbone, neck and region proposals (before their selection); the second stage is left out'
    return DetectorForms(outputs, forms, time_forms(forms, shape), shape, (folded, note))


def graph_of(detector: nn.Module, part: str) -> nn.Module:
    """A part of a detector as a network from images `[B, 3, H, W]` to a list of tensors, to be exported."""
    return _Unnamed(_Graph(detector, part)).eval()


class _Graph(nn.Module):
    """A part of a detector as a function of images `[B, 3, H, W]` to named tensors."""

    def __init__(self, detector: nn.Module, part: str):
        super().__init__()
        kept = {'backbone': ('backbone',), 'features': ('backbone', 'neck')}.get(part)
        alone = copy.copy(detector)  # the preprocessor's tables, and what is not run, do not go into the file
        alone._modules = {name: module for name, module in detector._modules.items()
                          if (name in kept if kept else name not in ('data_preprocessor', 'roi_head'))}
        self.detector, self.part = alone, part

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        detector: Any = self.detector
        if self.part == 'boxes':
            return select_boxes(detector, images)
        if self.part == 'backbone':
            return _named('level', detector.backbone(images))
        features = detector.extract_feat(images)
        if self.part == 'features':
            return _named('level', features)
        if not isinstance(detector, TwoStageDetector):
            return _named('head', detector.bbox_head(features))
        proposals = _named('rpn', detector.rpn_head(features)) if detector.with_rpn else {}
        return {**_named('level', features), **proposals}


class _Unnamed(nn.Module):
    """Its tensors as a list, which is what the forms of a model give."""

    def __init__(self, named: nn.Module):
        super().__init__()
        self.named = named  # `graph` is an attribute of every exported module

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return list(self.named(images).values())


def _named(name: str, outputs: Any) -> dict[str, torch.Tensor]:
    """The tensors in nested outputs, called by their places: `head_0_level_2`."""
    if isinstance(outputs, torch.Tensor):
        return {name: outputs}
    found: dict[str, torch.Tensor] = {}
    items: Sequence[tuple[Any, Any]] = list(
        outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs) if outputs is not None else ())
    for key, item in items:
        of_level = isinstance(item, torch.Tensor) and '_' in name
        found |= _named(f'{name}_level_{key}' if of_level else f'{name}_{key}', item)
    return found


def _images(data_dir: str | Path | None, size: int) -> np.ndarray:
    """Real images to check with, RGB, uint8, `[B, size, size, 3]`: a folder's, else the embedded scenes."""
    if data_dir is None:
        with tempfile.TemporaryDirectory() as folder:
            write_scenes(folder, size, dict(train=1, val=_CHECK_IMAGES))
            return _read(sorted((Path(folder) / 'val').iterdir()), size)
    files = sorted(p for p in Path(data_dir).rglob('*') if p.suffix.lower() in _SUFFIXES)[:_CHECK_IMAGES]
    if len(files) < 2:
        raise LeanError(f'--data-dir {data_dir} has {len(files)} images ({", ".join(_SUFFIXES)}); the exported file is '
                        'checked on at least 2.')
    return _read(files, size)


def _read(files: list[Path], size: int) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(read_image(f)).resize((size, size))) for f in files])


def _normalized(images: np.ndarray, preprocessor: Any) -> torch.Tensor:
    """As the detector's own preprocessor would hand them to its backbone, `[B, 3, size, size]`."""
    bgr = torch.from_numpy(images[..., ::-1].copy()).permute(0, 3, 1, 2)
    return preprocessor(dict(inputs=list(bgr)), training=False)['inputs']
