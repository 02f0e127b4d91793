"""ONNX with int8 weights and activations, by onnxruntime's own quantizer, judged by what it answers.

Static quantization with Q/DQ nodes: signed weights by one scale per output channel, unsigned activations by the ranges
that calibration images give. Rounding changes every output, so the file is not held to PyTorch's values but to its
answers: on how many images both name the same class, and, with labels, how often each is right.
"""
import contextlib
import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from timm_lean.checkpoint.files import atomic_file
from timm_lean.errors import LeanError

from .forms import check_onnx_installed, onnx_form, save_onnx

__all__ = ['Agreement', 'save_onnx_int8']


@dataclass(frozen=True)
class Agreement:
    """How an int8 file answers.

    Attributes:
        images: Images that were looked at.
        agree: Share of them on which the file names the same class as PyTorch.
        top1: Accuracy of PyTorch and of the file, in per cent; None without labels.
        error: Norm of the outputs' difference, relative to PyTorch's.
    """
    images: int
    agree: float
    top1: tuple[float, float] | None
    error: float

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        text = f'the class of PyTorch on {100 * self.agree:.2f} % of {self.images:,} images'
        if self.top1 is not None:
            text += f', top-1 {self.top1[1]:.2f} % (PyTorch {self.top1[0]:.2f} %)'
        return text + f', outputs off by {100 * self.error:.1f} %'


def save_onnx_int8(
        model: nn.Module, calibration: Iterable[Any], check: Iterable[Any], path: str | Path,
) -> Agreement:
    """Write a classifier as ONNX in int8, with a dynamic batch size.

    Args:
        model: A classifier in eval mode on the CPU.
        calibration: A few hundred images that set the ranges of activations, as batches `[B, C, H, W]` or tuples that
            start with them.
        check: Other images, as batches or `(images, labels [B])`, at least two in the first batch.
        path: The file to write.

    Returns:
        What the file answers to the images of `check`.

    Raises:
        LeanError: Packages are missing, no images, not a classifier, or a model that cannot be exported or quantized.
    """
    check_onnx_installed()
    batches, checked = [_images(batch).numpy() for batch in calibration], list(check)
    if not batches or not checked:
        raise LeanError('int8 needs images: some to set the ranges of activations, others to check the file with.')
    images = _images(checked[0])
    with torch.no_grad():
        example = model(images[:1])
    if not isinstance(example, torch.Tensor) or example.ndim != 2:
        raise LeanError('int8 is for classifiers, whose answers can be compared; this model gives something else.')
    with tempfile.TemporaryDirectory() as folder:
        whole, data = Path(folder) / 'float.onnx', Path(folder) / 'int8.onnx'
        save_onnx(model, images[:8], whole)
        _quantize(whole, data, batches)
        result = _compare(model, onnx_form(data), checked)
        with atomic_file(path) as temporary:
            temporary.write_bytes(data.read_bytes())
    return result


def _quantize(whole: Path, output: Path, batches: list[Any]) -> None:
    import onnxruntime.quantization as ort
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(ort.CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {'images': batch}

    prepared = whole.with_name('prepared.onnx')
    with _quiet():
        try:
            quant_pre_process(whole, prepared, skip_symbolic_shape=True)
            # signed activations, onnxruntime's default, took two to three times as long on AVX-512 with the same error
            ort.quantize_static(
                prepared, output, Reader(), quant_format=ort.QuantFormat.QDQ, per_channel=True,
                weight_type=ort.QuantType.QInt8, activation_type=ort.QuantType.QUInt8)
        except Exception as e:  # of many kinds
            raise LeanError(f'onnxruntime cannot quantize this model: {type(e).__name__}: '
                            f'{str(e).strip().partition(chr(10))[0][:300]}') from e


@torch.no_grad()
def _compare(model: nn.Module, form: nn.Module, batches: list[Any]) -> Agreement:
    count = agree = right = right_int8 = 0
    difference = size = 0.
    labelled = all(isinstance(batch, (tuple, list)) and len(batch) > 1 for batch in batches)
    for batch in batches:
        images = _images(batch)
        wanted, found = model(images), form(images)
        difference += float((found - wanted).double().square().sum())
        size += float(wanted.double().square().sum())
        answers, answers_int8 = wanted.argmax(1), found.argmax(1)
        count += len(images)
        agree += int((answers == answers_int8).sum())
        if labelled:
            right += int((answers == batch[1]).sum())
            right_int8 += int((answers_int8 == batch[1]).sum())
    top1 = (100 * right / count, 100 * right_int8 / count) if labelled else None
    return Agreement(count, agree / count, top1, (difference / max(size, 1e-300)) ** 0.5)


def _images(batch: Any) -> torch.Tensor:
    return batch[0] if isinstance(batch, (tuple, list)) else batch


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantizer's advice, which goes to the root logger, from the terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
