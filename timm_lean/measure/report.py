"""Size, compute, memory and speed of models, measured side by side."""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import get_model_input_config

from timm_lean.checkpoint.format import load_any

from .counts import count_macs, count_params
from .latency import inference, measure_latency
from .memory import peak_memory

__all__ = ['ModelReport', 'model_reports']


@dataclass
class ModelReport:
    """What a model costs.

    Attributes:
        name: As it was asked for.
        params: Parameters, shared ones counted once.
        macs: Multiply-accumulates of one image.
        bytes: Size of the checkpoint file; of the tensors if there is no file.
        img_size: Side of the image in pixels.
        latency_ms: Median milliseconds of one forward pass of a batch of one.
        latency_spread_ms: Half the distance between the quartiles of the repeats.
        peak_memory: Bytes allocated at most during a forward pass, beyond the parameters.
        device: Where latency and memory were measured.
        top1: Accuracy in percent on the images that were given.
    """
    name: str
    params: int
    macs: int
    bytes: int
    img_size: int
    latency_ms: float | None = None
    latency_spread_ms: float | None = None
    peak_memory: int | None = None
    device: str | None = None
    top1: float | None = None


def model_reports(
        sources: Sequence[str],
        img_size: int | None = None,
        latency: bool = False,
        device: torch.device | str = 'cpu',
        repeats: int = 20,
        **kwargs: Any,
) -> list[ModelReport]:
    """Measure timm names, checkpoints or `local-dir:DIR`s.

    Args:
        sources: The models.
        img_size: Side of the image; each model's own if None.
        latency: Also run them, in turn, so that a change of the machine's load falls on all alike.
        device: Where to run them.
        repeats: Timed forward passes of each.
        **kwargs: Model arguments for timm names.
    """
    reports, models, shapes = [], [], []
    for source in sources:
        path = Path(source.removeprefix('local-dir:'))
        stored = path.suffix == '.safetensors' or source.startswith('local-dir:')
        with torch.device('cpu' if latency or stored else 'meta'):
            model = load_any(source, **kwargs)
        if stored:
            size = (path if path.is_file() else path / 'model.safetensors').stat().st_size
        else:
            size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
        channels, *input_size = get_model_input_config(model)['input_size']
        shape = (1, channels, *((img_size, img_size) if img_size else input_size))
        reports.append(ModelReport(source, count_params(model), count_macs(model, shape), size, shape[-1]))
        models.append(model)
        shapes.append(shape)
    if latency:
        place = torch.device(device)
        timings = measure_latency(models, shapes, place, repeats)
        for report, model, shape, timing in zip(reports, models, shapes, timings, strict=True):
            report.device = str(device)
            report.latency_ms, report.latency_spread_ms = 1000 * timing.median, 1000 * timing.spread
            report.peak_memory = peak_memory(inference(model, torch.randn(*shape, device=place)), place)
    return reports
