"""`timm-lean export` for detectors: the folder that `load_detector` takes, and the backbone alone as ONNX or `.pt2`.

Necks and heads stay with MMDetection: their post-processing is not one graph. Runtimes that want the features get them.
"""
import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from timm_lean.checkpoint.files import output_file
from timm_lean.errors import LeanError
from timm_lean.export.forms import check_onnx_installed
from timm_lean.training.device import resolve_device
from timm_lean_cli.export import Row, fold_as_asked, format_rows, write_forms

from .backbone import TimmBackbone
from .detector import build_detector, export_detector, load_detector, load_strictly
from .predict import read_image
from .scenes import write_scenes
from .settings import open_config

__all__ = ['export_detector_command']

_CHECK_IMAGES = 8
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp')
_IMG_SIZE = 320


def export_detector_command(args: argparse.Namespace) -> None:
    """Run `timm-lean export` on a detector.

    Args:
        args: `model`, `det_dir`, `det_config`, `fold`, `onnx`, `torch_export`, `half`, `hf_dir`, `output`, `data`,
            `data_dir`, `img_size`, `device`.

    Raises:
        LeanError: Options for classification, or a detector that cannot be written so.
    """
    _check(args)
    if args.onnx or args.torch_export:
        _export_backbone(args)
    if args.det_dir:
        folder = export_detector(args.det_config, args.model, args.det_dir)
        print(f'{folder}: timm_lean.mmdet.load_detector({str(folder)!r})')


def _check(args: argparse.Namespace) -> None:
    if args.output or args.hf_dir or args.half:
        raise LeanError(f'{args.model} is a detector: -o, --hf-dir and --half are for classification. Give --det-dir '
                        'DIR for the whole detector, --onnx FILE or --torch-export FILE for its backbone.')
    if not (args.det_dir or args.onnx or args.torch_export):
        raise LeanError(f'{args.model} is a detector: give --det-dir DIR for the whole of it, --onnx FILE or '
                        '--torch-export FILE for its backbone.')
    if args.fold and not (args.onnx or args.torch_export):
        raise LeanError('--fold is for --onnx and --torch-export: detectors are stored as they are trained.')
    for option, path, suffix in (('--onnx', args.onnx, '.onnx'), ('--torch-export', args.torch_export, '.pt2')):
        if path:
            output_file(path, suffix, option)
    if args.onnx:
        check_onnx_installed()


def _export_backbone(args: argparse.Namespace) -> None:
    if args.det_config:
        model: Any = build_detector(open_config(args.det_config))
        load_strictly(model, args.model)
    else:
        model = load_detector(args.model)
    if not isinstance(model.backbone, TimmBackbone):
        raise LeanError(f'{args.model}: the backbone is a {type(model.backbone).__name__}, only a TimmBackbone can be '
                        'exported alone.')
    device, cpu = resolve_device(args.device), torch.device('cpu')
    size = args.img_size or _IMG_SIZE
    shape = (1, 3, size, size)
    net = model.backbone.net.eval()
    source = Path(args.model)
    rows: list[Row] = [(f'backbone of {args.model}', source.stat().st_size if source.is_file() else None, net, device)]
    images = _normalized(_images(args.data_dir, size), model.data_preprocessor)
    rows += write_forms(fold_as_asked(net, args.fold, shape, device).to(cpu), images, args.onnx, args.torch_export)
    print('levels: ' + ', '.join(
        f'level_{i}: stride {stride}, {channels} channels' for i, (stride, channels) in enumerate(
            zip(model.backbone.out_strides, model.backbone.out_channels, strict=True))))
    print(format_rows(rows, shape))


def _images(data_dir: str | None, size: int) -> np.ndarray:
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
