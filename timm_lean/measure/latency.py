"""Time of a forward pass and of a training step, measured for several models in turn."""
from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

from .timing import Timing, time_in_turn

__all__ = ['inference', 'measure_latency', 'measure_steps', 'training_step']


def measure_latency(
        models: Sequence[nn.Module], shapes: Sequence[Sequence[int]], device: torch.device, repeats: int = 20,
) -> list[Timing]:
    """Time the forward pass of models in eval mode, in turn.

    Args:
        models: The models; they are moved to the device.
        shapes: Their inputs' shapes `[B, C, H, W]`.
        device: Where to run.
        repeats: Timed forward passes of each.
    """
    works = {str(i): inference(model, torch.randn(*shape, device=device))
             for i, (model, shape) in enumerate(zip(models, shapes, strict=True))}
    return list(time_in_turn(works, device, repeats).values())


def measure_steps(
        models: Sequence[nn.Module], shape: Sequence[int], device: torch.device, repeats: int = 7, warmup: int = 2,
) -> list[Timing]:
    """Time a training step of each model, in turn.

    Args:
        models: Classifiers; they are moved to the device and their weights change.
        shape: `[B, C, H, W]` of the batch.
        device: Where to run.
        repeats: Timed steps of each.
        warmup: Untimed steps of each before.
    """
    x = torch.randn(*shape, device=device)
    works = {str(i): training_step(model, x) for i, model in enumerate(models)}
    return list(time_in_turn(works, device, repeats, warmup).values())


def inference(model: nn.Module, x: torch.Tensor, amp: bool = False) -> Callable[[], None]:
    """A function that runs a model in eval mode on a batch, on whose device it is moved; in bfloat16 if `amp`."""
    model.to(x.device).eval()

    @torch.no_grad()
    def run() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            model(x)
    return run


def training_step(model: nn.Module, x: torch.Tensor, amp: bool = False) -> Callable[[], None]:
    """A function that trains a classifier for one step on a batch `[B, C, H, W]`: forward, backward, SGD.

    Args:
        model: The classifier; it is moved to the batch's device and put into training mode.
        x: The images; they are all of class 0.
        amp: Forward pass in bfloat16.
    """
    model.to(x.device).train()
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step
