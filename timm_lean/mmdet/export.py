"""A detector's backbone alone, as ONNX and torch.export files for other runtimes.

Necks and heads stay with MMDetection: their post-processing is not one graph. Runtimes that want the features get them.
"""
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from timm_lean.errors import LeanError
from timm_lean.export.auto import fold_as_asked
from timm_lean.export.table import Form, format_forms, time_forms, write_forms

from .backbone import TimmBackbone
from .detector import build_detector, load_detector, load_strictly
from .predict import read_image
from .scenes import write_scenes
from .settings import open_config

__all__ = ['BackboneForms', 'export_backbone']

_CHECK_IMAGES = 8
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp')
IMG_SIZE = 320


@dataclass(frozen=True)
class BackboneForms:
    """What `export_backbone` wrote; `str()` says it.

    Attributes:
        levels: Stride and channels of every output.
        forms: The backbone in PyTorch, then the files.
        times: Milliseconds of each.
        shape: `[1, 3, H, W]`, the input of the latencies in the table.
        folded: What was folded; '' if nothing was to be.
    """
    levels: tuple[tuple[int, int], ...]
    forms: list[Form]
    times: list[float]
    shape: tuple[int, int, int, int]
    folded: str = ''

    def __str__(self) -> str:
        levels = ', '.join(
            f'level_{i}: stride {stride}, {channels} channels' for i, (stride, channels) in enumerate(self.levels))
        notes = [self.folded, *(form.note for form in self.forms), f'levels: {levels}']
        return '\n'.join([*filter(None, notes), format_forms(self.forms, self.times, self.shape)])


def export_backbone(
        source: str | Path,
        *,
        config: str | Path | None = None,
        onnx: str | Path | None = None,
        torch_export: str | Path | None = None,
        fold: str | None = None,
        img_size: int = IMG_SIZE,
        data_dir: str | Path | None = None,
        device: torch.device | str = 'cpu',
        trust_imports: Sequence[str] = (),
) -> BackboneForms:
    """Write the backbone of a trained detector in other forms, each checked against PyTorch on real images.

    Args:
        source: A file of `SafetensorsHook`, a folder of `export_detector`, or a `.pth` with its `config`.
        config: The detector's config, if it is a `.pth`.
        onnx: The `.onnx` file to write.
        torch_export: The `.pt2` file to write.
        fold: Fold shared bases first: 'all' of them, or 'auto', those that are faster dense on `device`.
        img_size: Side of the images it is checked and timed on, in pixels.
        data_dir: Images to check with; the embedded scenes if None.
        device: Where the backbone in PyTorch is timed.
        trust_imports: See `load_detector`.

    Raises:
        LeanError: Not a detector with a `TimmBackbone`, too few images, or a form that computes something else.
    """
    if config:
        model: Any = build_detector(open_config(config))
        load_strictly(model, source)
    else:
        model = load_detector(source, trust_imports=trust_imports)
    if not isinstance(model.backbone, TimmBackbone):
        raise LeanError(f'{source}: the backbone is a {type(model.backbone).__name__}, only a TimmBackbone can be '
                        'exported alone.')
    device, cpu = torch.device(device), torch.device('cpu')
    shape = (1, 3, img_size, img_size)
    images = _normalized(_images(data_dir, img_size), model.data_preprocessor)
    net = model.backbone.net.eval()
    first = Form.of_file(source, net, device, f'backbone of {source}')
    net, folded = fold_as_asked(net, fold, shape, device)
    forms = [first, *write_forms(net.to(cpu), images, onnx=onnx, torch_export=torch_export)]
    levels = zip(model.backbone.out_strides, model.backbone.out_channels, strict=True)
    return BackboneForms(tuple(levels), forms, time_forms(forms, shape), shape, folded)


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
