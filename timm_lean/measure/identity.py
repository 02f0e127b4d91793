"""How much a residual block changes its input: ||F(x)|| / ||x|| on data.

Source: https://arxiv.org/abs/2106.14190 holds that layers beyond the bound only pass their input on. A residual block
x + F(x) whose ratio is near 0 does just that.
"""
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck

from timm_lean.errors import LeanError

__all__ = ['NEAR_IDENTITY', 'identity_ratios', 'near_identity_share']

NEAR_IDENTITY = 0.1  # a block that changes its input by less than a tenth of its norm


@torch.no_grad()
def identity_ratios(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """Mean over images of ||F(x)|| / ||x|| for every residual block with an identity shortcut.

    Args:
        model: A network of timm's ResNet or inverted residual blocks; it runs in eval mode.
        batches: Images `[B, C, H, W]`, or tuples that start with them, on the model's device.

    Returns:
        Ratios by block name, in the order of the network. Blocks that change width or resolution have no identity to
        be near to and are left out.

    Raises:
        LeanError: The model has no such block, or there are no images.
    """
    sums: dict[str, float] = {}
    inputs: dict[str, torch.Tensor] = {}
    handles, names = [], []
    for name, block in model.named_modules():
        last = _last_norm(block)
        if last is None:
            continue
        names.append(name)

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            inputs[name] = args[0].flatten(1).norm(dim=1)

        def leave(module: nn.Module, args: Any, out: torch.Tensor, name: str = name) -> None:
            ratio = out.flatten(1).norm(dim=1) / inputs[name].clamp_min(1e-12)
            sums[name] = sums.get(name, 0.) + ratio.double().sum().item()

        handles += [block.register_forward_pre_hook(enter), last.register_forward_hook(leave)]
    if not names:
        raise LeanError(f'{type(model).__name__} has no residual block with an identity shortcut to measure.')
    training, images = model.training, 0
    try:
        model.eval()
        for batch in batches:
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            model(x)
            images += len(x)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not images:
        raise LeanError('The identity measure needs at least one batch of images, got none.')
    return {name: sums[name] / images for name in names}


def near_identity_share(ratios: dict[str, float], threshold: float = NEAR_IDENTITY) -> float:
    """Share of the blocks whose ratio is below the threshold."""
    return sum(r < threshold for r in ratios.values()) / len(ratios)


def _last_norm(block: nn.Module) -> nn.Module | None:
    """The module whose output is F(x), for blocks that add it to their unchanged input."""
    if isinstance(block, (BasicBlock, Bottleneck)):
        if block.downsample is not None or block.se is not None:
            return None
        return block.bn3 if isinstance(block, Bottleneck) else block.bn2
    if isinstance(block, (InvertedResidual, DepthwiseSeparableConv)) and block.has_skip:
        return block.bn3 if isinstance(block, InvertedResidual) else block.bn2
    return None
