"""The forms of one model beside each other: what was written, how large it is, how fast it runs."""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from timm_lean.measure import human_bytes, measure_latency

from .forms import onnx_form, save_onnx, save_torch_export, torch_export_form
from .int8 import save_onnx_int8

__all__ = ['Form', 'format_forms', 'time_forms', 'write_forms']

_CPU = torch.device('cpu')


@dataclass(frozen=True)
class Form:
    """One form of a model.

    Attributes:
        name: Its title in the table.
        bytes: Size of its file; None if there is none.
        module: How to run it.
        device: Where to run it.
        note: How well it agrees with PyTorch; '' for PyTorch itself.
    """
    name: str
    bytes: int | None
    module: nn.Module
    device: torch.device = _CPU
    note: str = ''

    @classmethod
    def of_file(cls, path: str | Path, module: nn.Module, device: torch.device, title: str = '') -> 'Form':
        """A model loaded from `path`; a name that is no file has no size."""
        file = Path(path)
        return cls(title or str(path), file.stat().st_size if file.is_file() else None, module, device)


def write_forms(
        model: nn.Module,
        images: torch.Tensor,
        *,
        onnx: str | Path | None = None,
        torch_export: str | Path | None = None,
        int8: Sequence[Iterable[Any]] | None = None,
        names: Sequence[str] | None = None,
) -> list[Form]:
    """Write a model as ONNX and by torch.export, whichever is asked for, each checked on real images.

    Args:
        model: A model in eval mode on the CPU.
        images: At least two images `[B, C, H, W]` to check the files with.
        onnx: The `.onnx` file to write.
        torch_export: The `.pt2` file to write.
        int8: Write ONNX in int8: batches to calibrate with, and batches to check with, see `save_onnx_int8`.
        names: What the outputs are called in ONNX, see `save_onnx`.
    """
    forms = []
    if onnx and int8 is not None:
        calibration, check = int8
        note = f'{onnx}: {save_onnx_int8(model, calibration, check, onnx)}'
        forms.append(Form(f'{onnx}, int8', Path(onnx).stat().st_size, onnx_form(onnx), note=note))
        onnx = None
    kinds = (onnx, partial(save_onnx, names=names), onnx_form), (torch_export, save_torch_export, torch_export_form)
    for path, save, load in kinds:
        if path:
            error = save(model, images, path)
            note = f'{path}: within {error:.1e} of PyTorch on {len(images)} images'
            forms.append(Form(str(path), Path(path).stat().st_size, load(path), note=note))
    return forms


def time_forms(forms: Sequence[Form], shape: Sequence[int]) -> list[float]:
    """Milliseconds of each form on an input `[B, C, H, W]`; those on one device take turns."""
    times: dict[int, float] = {}
    for device in dict.fromkeys(form.device for form in forms):
        chosen = [i for i, form in enumerate(forms) if form.device == device]
        measured = measure_latency([forms[i].module for i in chosen], [shape] * len(chosen), device)
        times.update({i: 1000 * timing.median for i, timing in zip(chosen, measured, strict=True)})
    return [times[i] for i in range(len(forms))]


def format_forms(forms: Sequence[Form], times: Sequence[float], shape: Sequence[int]) -> str:
    """A table of forms with what `time_forms` measured on inputs of a shape."""
    cells = [('form', 'file', 'latency', 'device')] + [
        (form.name, '-' if form.bytes is None else human_bytes(form.bytes), f'{ms:.2f} ms', str(form.device))
        for form, ms in zip(forms, times, strict=True)]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines = ['  '.join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines.append(f'latency: batch 1 of {shape[1]} x {shape[2]} x {shape[3]}, median of 20, in turn, '
                 f'{torch.get_num_threads()} threads')
    return '\n'.join(lines)
