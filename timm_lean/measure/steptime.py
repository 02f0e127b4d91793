"""Time of a training step, measured for several models in turn."""
import statistics
import time
from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['measure_steps']


def measure_steps(
        models: Sequence[nn.Module],
        shape: Sequence[int],
        device: torch.device,
        repeats: int = 7,
        warmup: int = 2,
) -> list[float]:
    """Median milliseconds of a training step (forward, backward, SGD) of each model.

    The models take turns, so that a change of the machine's load falls on all alike.

    Args:
        models: Classifiers; they are moved to the device and their weights change.
        shape: `[B, C, H, W]` of the batch.
        device: Where to run.
        repeats: Timed steps of each.
        warmup: Untimed steps of each before.
    """
    x, target = torch.randn(*shape, device=device), torch.zeros(shape[0], dtype=torch.long, device=device)
    models = [m.to(device).train() for m in models]
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-4, momentum=0.9) for m in models]
    times: list[list[float]] = [[] for _ in models]
    for round_ in range(-warmup, repeats):
        for model, optimizer, record in zip(models, optimizers, times, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            F.cross_entropy(model(x), target).backward()
            optimizer.step()
            optimizer.zero_grad()
            _synchronize(device)
            if round_ >= 0:
                record.append(1000 * (time.perf_counter() - start))
    return [statistics.median(record) for record in times]


def _synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
