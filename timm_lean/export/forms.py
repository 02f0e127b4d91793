"""Models as ONNX and torch.export files, each checked against PyTorch on given images before it is written."""
import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from timm_lean.checkpoint.files import atomic_file
from timm_lean.errors import LeanError

__all__ = ['RunnableForm', 'check_onnx_installed', 'exporting', 'half', 'onnx_form', 'save_onnx', 'save_torch_export',
           'torch_export_form']

_TOLERANCE = 1e-3  # of the largest output; rounding stays two orders below


class RunnableForm(nn.Module):
    """A file as a module, so that it can be run and timed beside models."""

    def __init__(self, run: Callable[[torch.Tensor], Any]):
        super().__init__()
        self.run = run

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(x)


def check_onnx_installed() -> None:
    """Raise a LeanError that names the extra unless ONNX export is possible."""
    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(name) is None]
    if missing:
        raise LeanError(f"--onnx needs {', '.join(missing)}, which is not installed: pip install 'timm-lean[onnx]'.")


def save_onnx(
        model: nn.Module, images: torch.Tensor, path: str | Path, names: Sequence[str] | None = None) -> float:
    """Write a model as ONNX with a dynamic batch size, in torch's current opset.

    Args:
        model: A model in eval mode on the CPU; its output is a tensor, or a list of feature maps.
        images: At least two real images `[B, C, H, W]` to check the file with.
        path: The file to write.
        names: What the outputs are called; if None `output`, or `level_0`, `level_1`, ... of a list.

    Returns:
        The largest difference to PyTorch's output, relative to the largest output.

    Raises:
        LeanError: Packages are missing, the model cannot be exported, or the file computes something else.
    """
    check_onnx_installed()
    if names is None:
        with torch.no_grad():
            example = model(images[:1])
        names = ['output'] if isinstance(example, torch.Tensor) else [f'level_{i}' for i in range(len(example))]
    with exporting('ONNX'):
        program = torch.onnx.export(model, (images[:2],), dynamo=True, verbose=False, input_names=['images'],
                                    output_names=list(names), dynamic_shapes=({0: torch.export.Dim('batch')},))
        assert program is not None
        data = program.model_proto.SerializeToString()
    error = _compare(model, onnx_form(data), images, 'ONNX')
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)
    return error


def onnx_form(source: bytes | str | Path) -> RunnableForm:
    """An ONNX file (or its bytes) run by onnxruntime on the CPU with as many threads as torch uses."""
    check_onnx_installed()
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        source if isinstance(source, bytes) else str(source), options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name

    def run(x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        outputs = [torch.from_numpy(y) for y in session.run(None, {name: x.numpy()})]
        return outputs[0] if len(outputs) == 1 else outputs
    return RunnableForm(run)


def save_torch_export(model: nn.Module, images: torch.Tensor, path: str | Path) -> float:
    """Write a model by torch.export with a dynamic batch size; see `save_onnx`."""
    buffer = io.BytesIO()
    with exporting('torch.export'):
        program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim('batch')},))
        torch.export.save(program, buffer)
    error = _compare(model, torch_export_form(buffer.getvalue()), images, 'torch.export')
    with atomic_file(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
    return error


def torch_export_form(source: bytes | str | Path) -> RunnableForm:
    """A `.pt2` file (or its bytes) as a module."""
    with _quiet():
        program = torch.export.load(io.BytesIO(source if isinstance(source, bytes) else Path(source).read_bytes()))
    module = program.module()
    return RunnableForm(lambda x: module(x))  # a submodule would refuse .eval()


def half(model: nn.Module) -> nn.Module:
    """A copy of a model in float16.

    Raises:
        LeanError: A value is too large for float16.
    """
    new = deepcopy(model).half()
    for name, tensor in new.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise LeanError(f'--half: {name} has values that float16 cannot hold (above 65,504). Export without it.')
    return new


@torch.no_grad()
def _compare(model: nn.Module, form: nn.Module, images: torch.Tensor, kind: str) -> float:
    error = 0.
    for part in (images, images[:1]):
        for expected, actual in zip(_tensors(model(part)), _tensors(form(part)), strict=True):
            if actual.shape != expected.shape:
                raise LeanError(f'The {kind} form gives {list(actual.shape)} instead of {list(expected.shape)}; '
                                'nothing was written.')
            scale = expected.abs().max().clamp_min(1e-12)
            error = max(error, ((actual - expected).abs().max() / scale).item())
    if not error <= _TOLERANCE:
        raise LeanError(f'The {kind} form differs from PyTorch by {error:.2g} of the largest output; '
                        'nothing was written.')
    return error


def _tensors(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else list(output)


@contextlib.contextmanager
def exporting(kind: str) -> Iterator[None]:
    """Within, an exporter (`kind` in messages) prints nothing, and what it raises is a LeanError of one line."""
    try:
        with _quiet():
            yield
    except Exception as e:  # the exporters raise their own, many kinds
        raise LeanError(f'{kind} cannot express this model: {type(e).__name__}: '
                        f'{str(e).strip().partition(chr(10))[0][:300]}') from e


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Keep the exporters' progress and deprecation notes from the terminal."""
    loggers = [logging.getLogger(name) for name in ('torch.onnx', 'onnxscript', 'onnx_ir', 'torch.export')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
