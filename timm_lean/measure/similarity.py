"""How alike the feature maps of a model's convolutions are, measured on data.

For a convolution with output `Y [B, C, H, W]` the similarity is the mean over images and over pairs of channels i < j
of `|<y_i, y_j>| / (||y_i|| ||y_j||)`, y the flattened map of one image: 0 for orthogonal maps, 1 for multiples of one
map. It is what Convolutional Similarity (https://arxiv.org/abs/2411.03226) is meant to lower.
"""
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from timm_lean.errors import LeanError
from timm_lean.layers import SharedBasisConv2d, SharedBasisLinear

from .pictures import layer_figure, save_figure

__all__ = ['feature_similarity', 'format_similarity', 'plot_similarity']

_MAX_COSINES = 2 ** 24  # elements of the [b, C, C] cosines held at once


@torch.no_grad()
def feature_similarity(
        model: nn.Module,
        loader: Iterable[Any],
        device: str | torch.device | None = None,
        max_batches: int | None = None,
) -> dict[str, float]:
    """Mean absolute cosine between two channels of one image, for every convolution layer.

    A shared-basis layer counts as one convolution, with the output of its coefficients. Layers are left out where the
    figure says nothing: one channel, or maps of one position, which are always multiples of each other. A map that is
    zero everywhere has cosine 0 with all others. A layer used several times per image is averaged over its uses.

    Args:
        model: The model, run in eval mode; its mode is restored.
        loader: Batches of images `[B, C, H, W]`, alone or first in a tuple, e.g. a data loader.
        device: Where to run; the model is moved there. Its own place if None.
        max_batches: Stop after this many batches.

    Returns:
        Layer name to similarity in [0, 1], in module order.

    Raises:
        LeanError: The model has no convolution, or the loader gave no image.
    """
    layers = _conv_layers(model)
    if max_batches is not None and max_batches < 1:
        raise LeanError(f'max_batches must be at least 1, got {max_batches!r}.')
    if device is not None:
        model.to(device)
    place = next(model.parameters()).device
    sums = {name: torch.zeros((), dtype=torch.float64, device=place) for name in layers}
    counts = dict.fromkeys(layers, 0)

    def hook(name: str) -> Any:
        def measure(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            if output.ndim == 4 and output.shape[1] > 1 and output.shape[2:].numel() > 1:
                value = _mean_cosines(output)
                sums[name] += value.to(place)
                counts[name] += len(output)
        return measure

    modes = {module: module.training for module in model.modules()}
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    images_seen = 0
    try:
        model.eval()
        for i, batch in enumerate(loader):
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            model(images.to(place))
            images_seen += len(images)
            if i + 1 == max_batches:
                break
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    if not images_seen:
        raise LeanError('Feature similarity: the data loader gave no images.')
    return {name: (sums[name] / counts[name]).item() for name in layers if counts[name]}


def _conv_layers(model: nn.Module) -> dict[str, nn.Module]:
    inner = {id(m) for layer in model.modules() if isinstance(layer, SharedBasisConv2d)
             for m in layer.modules() if m is not layer}
    layers: dict[str, nn.Module] = {
        name: m for name, m in model.named_modules() if id(m) not in inner
        and isinstance(m, (SharedBasisConv2d, nn.Conv2d)) and not isinstance(m, SharedBasisLinear)}
    if not layers:
        raise LeanError(f'Feature similarity needs 2-d convolutions, and {type(model).__name__} has none.')
    return layers


def _mean_cosines(maps: torch.Tensor) -> torch.Tensor:
    """Sum over images of the mean over channel pairs of |cosine|, for maps `[B, C, H, W]`."""
    channels = maps.shape[1]
    result = torch.zeros((), dtype=torch.float64, device=maps.device)
    with torch.autocast(maps.device.type, enabled=False):
        for part in maps.split(max(_MAX_COSINES // channels ** 2, 1)):
            rows = nn.functional.normalize(part.flatten(2).float(), dim=2)
            cosines = (rows @ rows.mT).abs_()
            diagonal = cosines.diagonal(dim1=1, dim2=2).sum(dtype=torch.float64)
            result += (cosines.sum(dtype=torch.float64) - diagonal) / (channels * (channels - 1))
    return result


def format_similarity(before: dict[str, float], after: dict[str, float] | None = None) -> str:
    """A table of one or two measurements, one layer per line, the mean over layers last."""
    width = max(len(name) for name in [*before, 'mean'])
    names = _common(before, after)
    columns = [before] if after is None else [before, after]
    head = ['similarity'] if after is None else ['before', 'after', 'change']
    lines = ['  '.join(['layer'.ljust(width), *(title.rjust(10) for title in head)])]
    for name in [*names, 'mean']:
        values = [sum(c.values()) / len(c) if name == 'mean' else c[name]
                  for c in ({n: column[n] for n in names} for column in columns)]
        cells = [f'{value:10.4f}' for value in values]
        if after is not None:
            cells.append(f'{values[1] - values[0]:+10.4f}')
        lines.append('  '.join([name.ljust(width), *cells]))
    return '\n'.join(lines)


def plot_similarity(before: dict[str, float], after: dict[str, float] | None, path: str | Path) -> None:
    """Draw one or two measurements side by side, a group of bars per layer, as `save_figure` writes pictures.

    Raises:
        LeanError: The two measurements have no layer in common, or the file cannot be written.
    """
    names = _common(before, after)
    figure, axes = layer_figure(names)
    columns = [('before', before)] if after is None else [('before', before), ('after', after)]
    width = 0.8 / len(columns)
    for k, (label, values) in enumerate(columns):
        places = [i + (k - (len(columns) - 1) / 2) * width for i in range(len(names))]
        axes.bar(places, [values[name] for name in names], width, label=label)
    axes.set_ylabel('mean |cosine| of two feature maps')
    axes.set_ylim(0, None)
    if after is not None:
        axes.legend()
    save_figure(figure, path)


def _common(before: dict[str, float], after: dict[str, float] | None) -> list[str]:
    names = [name for name in before if after is None or name in after]
    if not names:
        raise LeanError('Feature similarity: there is no layer to show' +
                        ('.' if after is None else ' that both measurements have.'))
    return names
