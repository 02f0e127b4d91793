"""Batch norm statistics measured on data: exact pooled moments, front to back."""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from .images import Chunk
from .moments import all_reduce
from .walk import Survey, Walk, hooked

__all__ = ['reestimate']


@torch.no_grad()
def reestimate(model: nn.Module, chunks: Sequence[Chunk], device: torch.device) -> bool:
    """Set the statistics of a network's batch norms to those of the images that are not held out, in place.

    Each is measured with all before it set already, over all images at once.

    Returns:
        Whether there was anything to measure.
    """
    norms = {name: module for name, module in model.named_modules()
             if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None}
    images = [chunk.images[~chunk.held].to(device) for chunk in chunks if not bool(chunk.held.all())]
    order = [name for name, joined in Survey().run(model, norms, images[0][:2]).order if not joined]
    with hooked(model, order):
        walks = [Walk(lambda x=x: model(x)) for x in images]  # type: ignore[misc]
        try:
            for name in order:
                mean, variance = pooled_moments([walk.to(name).inputs for walk in walks])
                norm: Any = norms[name]
                norm.running_mean.copy_(mean)
                norm.running_var.copy_(variance)
        finally:
            for walk in walks:
                walk.close()
    return bool(order)


def pooled_moments(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel, `[C]` in float64, over pieces `[B, C, ...]` and all processes."""
    sums = torch.zeros(3, inputs[0].shape[1], dtype=torch.float64, device=inputs[0].device)
    for x in inputs:
        rows = x.transpose(0, 1).flatten(1).double()
        sums += torch.stack([torch.full_like(sums[0], rows.shape[1]), rows.sum(1), rows.square().sum(1)])
    count, total, squares = all_reduce([sums])
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0)
