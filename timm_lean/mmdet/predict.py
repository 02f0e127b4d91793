"""Boxes and pictures from an exported detector."""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from mmdet.apis import inference_detector
from mmdet.visualization import DetLocalVisualizer
from PIL import Image, ImageOps

from timm_lean.checkpoint.files import atomic_file, writable_dir
from timm_lean.errors import LeanError

from .detector import load_detector

__all__ = ['draw', 'predict', 'predict_images', 'read_image']


def predict_images(
        source: str | Path,
        images: Sequence[str | Path],
        out: str | Path | None = None,
        score_thr: float = 0.3,
        device: str = 'cpu',
        *,
        trust_imports: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Detect objects in image files and draw them.

    Args:
        source: What `load_detector` takes.
        images: Image files.
        out: The picture to write, for one image; a folder for several (or if the name has no suffix). None draws
            nothing.
        score_thr: Least score of a box.
        device: Where to run.
        trust_imports: See `load_detector`.

    Returns:
        For each image `{'image': path, 'picture': path or None, 'boxes': [{'class': name, 'score': s, 'box': [x1, y1,
        x2, y2]}, ...]}`, pixels of the image, best first.

    Raises:
        LeanError: The detector or an image cannot be read, or a picture cannot be written.
    """
    if not 0 <= score_thr <= 1:
        raise LeanError(f'The score threshold must be between 0 and 1, got {score_thr}.')
    arrays = [read_image(path) for path in images]
    names = _picture_names(images, out)
    model: Any = load_detector(source, device, trust_imports=trust_imports)
    results = []
    for path, array, picture in zip(images, arrays, names, strict=True):
        boxes = predict(model, array, score_thr)
        if picture is not None:
            draw(model, array, boxes, picture)
        results.append({'image': str(path), 'picture': str(picture) if picture else None, 'boxes': boxes})
    return results


@torch.no_grad()
def predict(model: Any, image: np.ndarray, score_thr: float = 0.3) -> list[dict[str, Any]]:
    """Boxes in one image.

    Args:
        model: From `load_detector`.
        image: RGB, uint8, `[H, W, 3]`.
        score_thr: Least score.
    """
    found = inference_detector(model, np.ascontiguousarray(image[:, :, ::-1])).pred_instances.cpu()
    found = found[found.scores >= score_thr]
    found = found[found.scores.argsort(descending=True)]
    classes = model.dataset_meta.get('classes', ())
    return [
        {'class': classes[label] if label < len(classes) else str(label), 'index': label, 'score': score, 'box': box}
        for label, score, box in zip(found.labels.tolist(), found.scores.tolist(), found.bboxes.tolist(), strict=True)]


def draw(model: nn.Module, image: np.ndarray, boxes: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Write a picture of an image `[H, W, 3]` (RGB, uint8) with boxes in the colours of the classes."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData
    sample = DetDataSample()
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor([b['box'] for b in boxes]).reshape(-1, 4),
        labels=torch.tensor([b['index'] for b in boxes], dtype=torch.long),
        scores=torch.tensor([b['score'] for b in boxes]))
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = model.dataset_meta
    visualizer.add_datasample('image', image, sample, draw_gt=False, pred_score_thr=0.)
    suffix = Path(path).suffix.lower()
    with atomic_file(path) as temporary:
        Image.fromarray(visualizer.get_image()).save(temporary, format='PNG' if suffix == '.png' else 'JPEG')


def read_image(path: str | Path) -> np.ndarray:
    """An image file as RGB, uint8, `[H, W, 3]`, turned as its EXIF says."""
    try:
        with Image.open(path) as f:
            return np.asarray(ImageOps.exif_transpose(f).convert('RGB'))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise LeanError(f'The image {path} cannot be read: {e}') from e


def _picture_names(images: Sequence[str | Path], out: str | Path | None) -> list[Path | None]:
    if out is None:
        return [None] * len(images)
    out = Path(out)
    if out.suffix:
        if len(images) != 1:
            raise LeanError(f'{out} is one picture, but there are {len(images)} images. Give the name of a folder.')
        if out.suffix.lower() not in ('.jpg', '.jpeg', '.png'):
            raise LeanError(f'{out}: pictures are written as .jpg or .png.')
        writable_dir(out.parent)
        return [out]
    names = [Path(path).stem for path in images]
    if len(set(names)) < len(names):
        names = [f'{i}_{name}' for i, name in enumerate(names)]
    writable_dir(out)
    return [out / f'{name}.jpg' for name in names]
