"""Accuracy of a classification model on a loader."""
import time
from typing import Any

import torch
import torch.nn as nn
from timm.task import ClassificationEvaluator, evaluation_sample_limit

from .device import autocast

__all__ = ['evaluate']


@torch.no_grad()
def evaluate(
        model: nn.Module, loader: Any, device: torch.device, amp: str = '', distributed: bool = False,
) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy in percent, and throughput.

    Args:
        model: The model; it is left in eval mode.
        loader: Batches `([B, C, H, W], [B])` on the device.
        device: Where the model is.
        amp: '', 'bf16' or 'fp16'.
        distributed: Sum the counts over all processes.
    """
    model.eval()
    evaluator = ClassificationEvaluator(device=device, max_samples=evaluation_sample_limit(loader))
    start, images = time.perf_counter(), 0
    for x, target in loader:
        with autocast(device, amp):
            output = model(x)
        evaluator.update(output, target)
        images += len(x)
    metrics = dict(evaluator.compute(distributed=distributed))
    metrics['images_per_second'] = images / max(time.perf_counter() - start, 1e-9)
    return metrics


