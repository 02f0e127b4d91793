"""Size, compute, memory and speed of models, as one table.

Multiply-accumulates are those of convolutions and matrix products (`torch.utils.flop_counter`, divided by two) plus
two for each element that batch norm touches: the convention of the sharing paper's tables and of Torch-Pruning.
Activations and pooling are not counted.
"""
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.models import get_model_input_config
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from timm_lean.checkpoint.format import load_any

__all__ = ['ModelReport', 'count_macs', 'count_params', 'format_table', 'measure_latency', 'model_reports', 'to_json']


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
        timings = measure_latency(models, shapes, torch.device(device), repeats)
        for report, measured in zip(reports, timings, strict=True):
            report.device = str(device)
            report.latency_ms, report.latency_spread_ms, report.peak_memory = measured
    return reports


def count_params(model: nn.Module) -> int:
    """Parameters of a model, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-accumulates of a forward pass of `shape` = `[B, C, H, W]`."""
    training = model.training
    device = next(model.parameters()).device
    normalized = 0

    def count_batchnorm(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        nonlocal normalized
        normalized += 2 * output.numel()

    handles = [m.register_forward_hook(count_batchnorm) for m in model.modules() if isinstance(m, _BatchNorm)]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.eval()(torch.zeros(*shape, device=device))
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    return counter.get_total_flops() // 2 + normalized


@torch.no_grad()
def measure_latency(
        models: Sequence[nn.Module], shapes: Sequence[Sequence[int]], device: torch.device, repeats: int = 20,
) -> list[tuple[float, float, int]]:
    """Run models in eval mode, in turn.

    Args:
        models: The models.
        shapes: Their inputs' shapes `[B, C, H, W]`.
        device: Where to run.
        repeats: Timed forward passes of each.

    Returns:
        For each model the median milliseconds, half the interquartile range in milliseconds, and the peak bytes
        allocated beyond what was allocated before (parameters and input).
    """
    models = [model.to(device).eval() for model in models]
    inputs = [torch.randn(*shape, device=device) for shape in shapes]
    times: list[list[float]] = [[] for _ in models]
    for repeat in range(-3, repeats):  # the first rounds warm up
        for model, x, record in zip(models, inputs, times, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            model(x)
            _synchronize(device)
            if repeat >= 0:
                record.append(1000 * (time.perf_counter() - start))
    results = []
    for model, x, record in zip(models, inputs, times, strict=True):
        low, _, high = statistics.quantiles(record, n=4)
        results.append((statistics.median(record), (high - low) / 2, _peak_memory(model, x, device)))
    return results


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def _peak_memory(model: nn.Module, x: torch.Tensor, device: torch.device) -> int:
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        model(x)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # CUDA builds complain on stderr where there is no GPU
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        model(x)
    live = peak = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == '[memory]':
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def format_table(reports: Sequence[ModelReport]) -> str:
    """Reports as aligned columns; from the second on with the ratio to the first."""
    first = reports[0]
    columns: list[tuple[str, list[str]]] = [('model', [r.name for r in reports])]

    def add(title: str, values: list[float | None], show: Any, ratio: bool = True) -> None:
        if all(v is None for v in values):
            return
        cells = []
        for v in values:
            text = '-' if v is None else show(v)
            if v is not None and ratio and len(values) > 1 and values[0]:
                text += f' ({v / values[0]:.2f}x)'
            cells.append(text)
        columns.append((title, cells))

    add('params', [r.params for r in reports], lambda v: f'{v:,}')
    add(f'MACs @{first.img_size}', [r.macs for r in reports], human_count)
    add('file', [r.bytes for r in reports], human_bytes)
    add('latency', [r.latency_ms for r in reports], lambda v: f'{v:.2f} ms')
    add('peak memory', [r.peak_memory for r in reports], human_bytes)
    add('top-1', [r.top1 for r in reports], lambda v: f'{v:.2f} %', ratio=False)
    widths = [max(len(title), *map(len, cells)) for title, cells in columns]
    lines = ['  '.join(title.ljust(w) for (title, _), w in zip(columns, widths, strict=True))]
    for i in range(len(reports)):
        lines.append('  '.join(cells[i].ljust(w) for (_, cells), w in zip(columns, widths, strict=True)))
    if any(r.latency_ms is not None for r in reports):
        spreads = ', '.join(f'±{r.latency_spread_ms:.2f}' for r in reports)
        lines.append(f'latency: batch 1 on {first.device}, {torch.get_num_threads()} threads, median of repeats '
                     f'({spreads} ms half interquartile range)')
    return '\n'.join(line.rstrip() for line in lines)


def to_json(reports: Sequence[ModelReport]) -> str:
    """Reports as a JSON array."""
    return json.dumps([asdict(r) for r in reports], indent=2)


def human_count(value: float) -> str:
    """1234567 -> '1.23 M'."""
    for unit, factor in (('G', 1e9), ('M', 1e6), ('k', 1e3)):
        if value >= factor:
            return f'{value / factor:.2f} {unit}'
    return f'{value:.0f}'


def human_bytes(value: float) -> str:
    """1234567 -> '1.2 MB'."""
    for unit, factor in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
        if value >= factor:
            return f'{value / factor:.1f} {unit}'
    return f'{value:.0f} B'
