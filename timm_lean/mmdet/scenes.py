"""A tiny real detection dataset without a download: scikit-learn's handwritten digits composed into scenes.

Every scene is a noisy gray image with a few digits of different sizes and brightnesses, real samples of the UCI digits
(1,797 images of 8 x 8), each box tight around its strokes. Every fifth sample occurs in validation scenes only.
"""
import json
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.datasets import CocoDataset
from PIL import Image

from timm_lean.checkpoint.files import atomic_file, writable_dir
from timm_lean.errors import LeanError
from timm_lean.training.data import digits_split

from .scope import DATASETS, register

__all__ = ['DigitScenes', 'write_scenes']

CLASSES = tuple(str(i) for i in range(10))
_SPLITS = {'train': (240, 0), 'val': (48, 1)}  # number of scenes, seed
_MAX_IOU = 0.05  # of two digits' squares


def write_scenes(root: str | Path, size: int = 128, counts: dict[str, int] | None = None) -> None:
    """Write the dataset: `train/*.png`, `val/*.png` and `annotations/{train,val}.json`, the same every time.

    Annotations are written last and whole, so their presence says that a split is complete; what is there is kept.

    Args:
        root: The folder.
        size: Side of the images in pixels.
        counts: Scenes of each split; 240 and 48 if not given.

    Raises:
        LeanError: The folder cannot be written, or holds scenes of another size or number.
    """
    root = Path(root)
    for split, (count, seed) in _SPLITS.items():
        count = (counts or {}).get(split, count)
        annotations = root / 'annotations' / f'{split}.json'
        if annotations.is_file():
            _check_existing(annotations, size, count)
        else:
            _write_split(root, split, count, size, seed)


def _check_existing(path: Path, size: int, count: int) -> None:
    try:
        images = json.loads(path.read_text())['images']
        found = len(images), images[0]['width']
    except (ValueError, KeyError, IndexError, TypeError) as e:
        raise LeanError(f'{path} is damaged. Delete its folder; the scenes are generated again.') from e
    if found != (count, size):
        raise LeanError(f'{path} describes {found[0]} scenes of {found[1]} pixels, not {count} of {size}. Delete its '
                        'folder, or give another data_root.')


def _write_split(root: Path, split: str, count: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    digits, labels = digits_split(split)
    pixels = digits / 16
    folder = writable_dir(root / split)
    images: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []
    for index in range(count):
        scene, found = _compose(rng, pixels, labels, size)
        name = f'{index:04d}.png'
        with atomic_file(folder / name) as temporary:
            Image.fromarray(scene).save(temporary, format='PNG')
        images.append(dict(id=index, file_name=name, width=size, height=size))
        for label, (x, y, w, h) in found:
            boxes.append(dict(
                id=len(boxes) + 1, image_id=index, category_id=label, bbox=[x, y, w, h], area=w * h, iscrowd=0))
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES)]
    with atomic_file(root / 'annotations' / f'{split}.json') as temporary:
        temporary.write_text(json.dumps(dict(images=images, annotations=boxes, categories=categories)))


def _compose(
        rng: np.random.Generator, pixels: np.ndarray, labels: np.ndarray, size: int,
) -> tuple[np.ndarray, list[tuple[int, tuple[int, int, int, int]]]]:
    """One scene `[size, size, 3]`, uint8, and its labels with boxes (x, y, width, height)."""
    background = rng.uniform(20, 90)
    scene = np.full((size, size), background) + rng.normal(0, 8, (size, size))
    found: list[tuple[int, tuple[int, int, int, int]]] = []
    squares: list[tuple[int, int, int]] = []
    for _ in range(int(rng.integers(3, 7))):
        index = int(rng.integers(len(labels)))
        for _attempt in range(20):
            side = int(rng.integers(size * 4 // 16, size * 6 // 16))
            x, y = (int(v) for v in rng.integers(0, size - side, 2))
            if all(_iou((x, y, side), other) <= _MAX_IOU for other in squares):
                break
        else:
            continue
        squares.append((x, y, side))
        digit = Image.fromarray((pixels[index] * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)
        strokes = np.asarray(digit) / 255
        scene[y:y + side, x:x + side] += strokes * rng.uniform(100, 160)
        rows, columns = np.where((strokes > 0.3).any(1))[0], np.where((strokes > 0.3).any(0))[0]
        found.append((int(labels[index]), (
            x + int(columns[0]), y + int(rows[0]), int(columns[-1] - columns[0] + 1), int(rows[-1] - rows[0] + 1))))
    gray = scene.clip(0, 255).astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2), found


def _iou(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    width, height = (max(0, min(a[i] + a[2], b[i] + b[2]) - max(a[i], b[i])) for i in (0, 1))
    return width * height / (a[2] ** 2 + b[2] ** 2 - width * height)


@register(DATASETS)
class DigitScenes(CocoDataset):
    """The scenes as an MMDetection dataset that writes its files to `data_root` when they are not there.

    Args:
        data_root: The folder.
        split: `train` or `val`.
        size: Side of the images.
        counts: Scenes of each split.
        **kwargs: Arguments of `CocoDataset`.
    """
    METAINFO = dict(classes=CLASSES)  # noqa: RUF012  (MMDetection's convention)

    def __init__(
            self, data_root: str, split: str = 'train', size: int = 128, counts: dict[str, int] | None = None,
            **kwargs: Any,
    ):
        if split not in _SPLITS:
            raise LeanError(f'DigitScenes has the splits {", ".join(_SPLITS)}, got {split!r}.')
        write_scenes(data_root, size, counts)
        super().__init__(
            data_root=data_root, ann_file=f'annotations/{split}.json', data_prefix=dict(img=f'{split}/'), **kwargs)
