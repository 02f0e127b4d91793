"""Fold a shared convolution only where its dense form is measured to be faster on this device."""
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn as nn

from timm_lean.errors import LeanError
from timm_lean.layers import SharedBasisConv2d
from timm_lean.measure import measure_latency
from timm_lean.sharing.fold import fold

__all__ = ['fold_as_asked', 'fold_faster']


def fold_as_asked(
        model: nn.Module,
        how: str | None,
        shape: Sequence[int],
        device: torch.device | str = 'cpu',
) -> tuple[nn.Module, str]:
    """Fold nothing, everything, or what is faster dense; the way in which `export` folds.

    Args:
        model: A model in eval mode.
        how: None, 'all' or 'auto'.
        shape: Shape `[B, C, H, W]` of the model's input.
        device: Where 'auto' measures.

    Returns:
        The model and a line that says what was done, '' if nothing was asked for. A model with nothing to fold is
        returned as it is.
    """
    if how is None:
        return model, ''
    if not any(isinstance(m, SharedBasisConv2d) for m in model.modules()):
        return model, 'nothing to fold: the network has no shared convolution'
    if how == 'all':
        new = fold(model)
        return new, str(new.lean_report)
    new, times = fold_faster(model, shape, device)
    folded = sum(dense < shared for shared, dense in times.values())
    return new, f'{folded} of {len(times)} shared convolutions are faster dense on {device} and were folded'


def fold_faster(
        model: nn.Module,
        shape: Sequence[int],
        device: torch.device | str = 'cpu',
        repeats: int = 20,
) -> tuple[nn.Module, dict[str, tuple[float, float]]]:
    """Fold the shared convolutions that are faster dense.

    Both forms of a layer run in turn on the input it gets from an image; layers of equal shape are measured once. The
    batch norm behind a layer, which folding takes in as well, is not counted.

    Args:
        model: A model in eval mode.
        shape: Shape `[B, C, H, W]` of the model's input.
        device: Where to measure.
        repeats: Timed passes of each form.

    Returns:
        The folded model (a plain copy if no layer is faster) and for each layer its milliseconds, shared and dense.

    Raises:
        LeanError: There is nothing to fold.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, SharedBasisConv2d)}
    if not layers:
        raise LeanError('fold() found no shared convolution to fold in this model.')
    shapes = _input_shapes(model, layers, shape)
    measured: dict[Any, tuple[float, float]] = {}
    times = {}
    for name, layer in layers.items():
        if name not in shapes:
            continue  # not used by the forward pass
        key = (str(layer), tuple(bank.groups for bank in layer.banks()), shapes[name])
        if key not in measured:
            forms: list[nn.Module] = [deepcopy(layer), deepcopy(layer).fuse()]
            shared, dense = measure_latency(forms, [shapes[name]] * 2, torch.device(device), repeats)
            measured[key] = 1000 * shared.median, 1000 * dense.median
        times[name] = measured[key]
    faster = [name for name, (shared_ms, dense_ms) in times.items() if dense_ms < shared_ms]
    return fold(model, include=faster) if faster else deepcopy(model), times


@torch.no_grad()
def _input_shapes(
        model: nn.Module, layers: dict[str, SharedBasisConv2d], shape: Sequence[int],
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, layer in layers.items():
        def hook(module: nn.Module, args: Any, name: str = name) -> None:
            shapes[name] = tuple(args[0].shape)
        handles.append(layer.register_forward_pre_hook(hook))
    try:
        model(torch.zeros(*shape, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return shapes
