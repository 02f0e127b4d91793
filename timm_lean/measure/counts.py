"""Parameters and multiply-accumulates of a model, as a whole and module by module.

Limits, stated first: multiply-accumulates are those of convolutions and matrix products (`torch.utils.flop_counter`,
divided by two) plus two for each element that batch norm touches, the convention of the sharing paper's tables and of
Torch-Pruning. Activations, pooling and other normalizations are not counted. A module that another one uses without
calling it (its weight alone, say) has no multiply-accumulates of its own; they are the caller's.
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['count_macs', 'count_params', 'macs_by_module']


def count_params(model: nn.Module) -> int:
    """Parameters of a model, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-accumulates of a forward pass of `shape` = `[B, C, H, W]` in eval mode."""
    return macs_by_module(model, shape)['']


@torch.no_grad()
def macs_by_module(model: nn.Module, shape: Sequence[int]) -> dict[str, int]:
    """Multiply-accumulates of every module, those of the modules within it included.

    Args:
        model: The model; it runs once in eval mode, where it is (a model on the meta device costs nothing).
        shape: Shape `[B, C, H, W]` of its input.

    Returns:
        Module name to multiply-accumulates, in module order; '' is the whole model. A module that is used several times
        has those of all its uses.
    """
    counter = FlopCounterMode(display=False)
    normalized = 0
    counts = {name: 0 for name, _ in model.named_modules()}
    before: list[int] = []  # what was counted when the modules that are running were entered

    def counted() -> int:
        return counter.get_total_flops() // 2 + normalized

    def enter(module: nn.Module, args: Any) -> None:
        before.append(counted())

    def leave(name: str, module: nn.Module, output: Any) -> None:
        nonlocal normalized
        if isinstance(module, _BatchNorm):
            normalized += 2 * output.numel()
        counts[name] += counted() - before.pop()

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(
            lambda module, args, output, name=name: leave(name, module, output)))
    training = model.training
    try:
        with counter:
            model.eval()(torch.zeros(*shape, device=next(model.parameters()).device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return counts
