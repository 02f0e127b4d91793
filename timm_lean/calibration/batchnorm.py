"""Batch norm statistics measured on data: exact pooled moments, front to back.

A batch norm is measured over all images at once, with those before it set already. This serves a compressed network
whose statistics are measured anew (`reestimate`), and batch norms that are put into a network and change nothing at
first (`insert_norms`).
"""
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn as nn

from timm_lean.errors import LeanError

from .fleet import fleet, survey
from .images import Chunk, load_chunks
from .memory import memory_told
from .moments import all_reduce
from .settings import Calibration
from .walk import evaluation

__all__ = ['insert_norms', 'reestimate']


@torch.no_grad()
def reestimate(model: nn.Module, chunks: Sequence[Chunk], memory_limit: float) -> bool:
    """Set the statistics of a network's batch norms to those of the images that are not held out, in place.

    Frozen batch norms stay as they are.

    Returns:
        Whether there was anything to measure.
    """
    norms = [name for name, module in model.named_modules()
             if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
             and all(p.requires_grad for p in module.parameters())]
    seen = [part for chunk in chunks if (part := chunk.part(held=False)) is not None]
    with evaluation(model):
        for name, mean, variance in _measure(model, norms, seen, memory_limit):
            norm: Any = model.get_submodule(name)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
    return bool(norms)


@torch.no_grad()
def insert_norms(model: nn.Module, names: Sequence[str], calibration: Calibration | Iterable[Any]) -> None:
    """Fill new batch norms in place so that they change nothing: weight and bias undo the statistics.

    What they are given is measured as training would see it, with all other batch norms normalizing by the batch. So
    what is exact in eval mode by construction is so in training mode too, as far as later batches have the statistics
    of these. Training may then scale each channel by itself.

    Args:
        model: The network.
        names: Its new batch norms.
        calibration: Images, see `Calibration`.

    Raises:
        LeanError: As `load_chunks`, or batches of too few images for a batch norm.
    """
    copy, setting = deepcopy(model), Calibration.of(calibration)
    with memory_told(setting.memory_limit), evaluation(copy):
        for module in copy.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        for name in names:
            norm: Any = copy.get_submodule(name).eval()
            norm.weight.fill_((1 + norm.eps) ** 0.5)  # with mean 0 and variance 1 it passes everything on
        try:
            measured = list(_measure(copy, names, load_chunks(setting)))
        except ValueError as e:
            if 'more than 1 value per channel' not in str(e):
                raise
            raise LeanError('A calibration batch has a single image, of which a batch norm of the network is given one '
                            'value: give batches of at least 2 images.') from e
    for name, mean, variance in measured:
        norm = model.get_submodule(name)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(norm.running_mean)


def _measure(
        model: nn.Module, names: Sequence[str], chunks: Sequence[Chunk], memory_limit: float = float('inf'),
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Mean and variance of what each batch norm is given; what is done to it meanwhile has its effect on the next."""
    met = survey(model, names, chunks)
    with fleet([model], names, chunks, met, memory_limit) as ships:
        for name, joined in met.order:
            if not joined:
                yield name, *_pooled([ship.walks[0].to(name).inputs for ship in ships.at(name)])


def _pooled(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of each channel, `[C]` in float64, over pieces `[B, C, ...]` and all processes."""
    sums = torch.zeros(3, inputs[0].shape[1], dtype=torch.float64, device=inputs[0].device)
    for x in inputs:
        rows = x.transpose(0, 1).flatten(1).double()
        sums += torch.stack([torch.full_like(sums[0], rows.shape[1]), rows.sum(1), rows.square().sum(1)])
    count, total, squares = all_reduce([sums])
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0)
