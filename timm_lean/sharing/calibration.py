"""A batch norm between the filters and the coefficients of converted layers that changes nothing at first.

Its statistics are those of the filters' responses to data, and its weight and bias undo them. Training may then scale
each filter by itself, as in the paper's networks, which have such a batch norm.

The responses are those that training would see, with all other batch norms normalizing by the batch. So what is exact
in eval mode by construction is exact in training mode too, as far as later batches have the statistics of these.
"""
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
import torch.nn as nn

from timm_lean.errors import LeanError

__all__ = ['calibrate']


@torch.no_grad()
def calibrate(model: nn.Module, names: Iterable[str], batches: Iterable[Any]) -> None:
    """Fill the batch norms of the named shared layers, in place.

    Args:
        model: The converted network.
        names: Layers whose batch norm is new.
        batches: Images `[B, C, H, W]`, or tuples that start with them, on the model's device.

    Raises:
        LeanError: There are no images.
    """
    names = list(names)
    copy = deepcopy(model).eval()  # the other batch norms keep their statistics
    for module in copy.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    norms = _norms(copy, names)
    sums = {norm: torch.zeros(3, len(norm.running_mean), dtype=torch.float64) for norm in norms}

    def collect(norm: Any, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0].double()
        count = torch.full((x.shape[1],), x.numel() / x.shape[1], device=x.device, dtype=x.dtype)
        sums[norm] += torch.stack([count, x.sum((0, 2, 3)), x.square().sum((0, 2, 3))]).cpu()

    for norm in norms:
        norm.eval().weight.fill_((1 + norm.eps) ** 0.5)  # with mean 0 and variance 1 it passes everything on
        norm.register_forward_pre_hook(collect)
    for batch in batches:
        copy(batch[0] if isinstance(batch, (tuple, list)) else batch)
    for norm, measured in zip(_norms(model, names), norms, strict=True):
        count, total, squares = sums[measured]
        if not bool(count.all()):
            raise LeanError('bn=True needs images to measure the responses of the filters on, got no batch.')
        mean = total / count
        variance = (squares / count - mean.square()).clamp_min(0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(norm.running_mean)


def _norms(model: nn.Module, names: list[str]) -> list[Any]:
    return [model.get_submodule(name).bn for name in names]
