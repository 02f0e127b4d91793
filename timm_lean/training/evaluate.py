"""Accuracy of a classification model on a loader."""
import time
from typing import Any

import torch
import torch.nn as nn
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from tqdm import tqdm

from timm_lean.errors import LeanError

from .data import class_names, open_eval_loader
from .device import autocast

__all__ = ['evaluate', 'evaluate_source', 'labelled_loader']


@torch.no_grad()
def evaluate(
        model: nn.Module,
        loader: Any,
        device: torch.device,
        amp: str = '',
        distributed: bool = False,
        progress: bool = False,
) -> dict[str, float]:
    """Loss, top-1 and top-5 accuracy in percent, and throughput.

    Args:
        model: The model; it is left in eval mode.
        loader: Batches `([B, C, H, W], [B])` on the device.
        device: Where the model is.
        amp: '', 'bf16' or 'fp16'.
        distributed: Sum the counts over all processes.
        progress: Show a progress bar.
    """
    model.eval()
    evaluator = ClassificationEvaluator(device=device, max_samples=evaluation_sample_limit(loader))
    start, images = time.perf_counter(), 0
    for x, target in tqdm(loader, 'evaluate', unit=' batches', disable=not progress, leave=False):
        with autocast(device, amp):
            output = model(x)
        evaluator.update(output, target)
        images += len(x)
    metrics = dict(evaluator.compute(distributed=distributed))
    metrics['images_per_second'] = images / max(time.perf_counter() - start, 1e-9)
    return metrics


def evaluate_source(
        source: str,
        model: Any,
        data: str = '',
        data_dir: str | None = None,
        img_size: int | None = None,
        batch_size: int = 128,
        device: torch.device | str = 'cpu',
        workers: int = 2,
        amp: str = '',
        progress: bool = False,
) -> dict[str, float]:
    """`evaluate` on a dataset, with the number of `images`; the model moves to the device.

    Args:
        source: What the model was loaded from, for messages.
        model: A timm model.
        data: See `open_eval_loader`, as `data_dir`, `img_size`, `batch_size` and `workers`.
        amp: See `evaluate`, as `progress`.

    Raises:
        LeanError: See `labelled_loader`.
    """
    device = torch.device(device)
    model = model.to(device)
    loader = labelled_loader(
        source, model, data=data, data_dir=data_dir, img_size=img_size, batch_size=batch_size, device=device,
        workers=workers)
    return {**evaluate(model, loader, device, amp, progress=progress), 'images': len(loader.dataset)}


def labelled_loader(source: str, model: Any, **options: Any) -> Any:
    """`open_eval_loader`, of images whose labels are the model's classes.

    Args:
        source: What the model was loaded from, for messages.
        model: A timm model.
        **options: Of `open_eval_loader`.

    Raises:
        SplitError: No such images, or no labels.
        LeanError: The data has other classes than the model.
    """
    loader = open_eval_loader(model, **options)
    classes, known = class_names(loader.dataset), model.pretrained_cfg.get('label_names')
    if len(classes) > model.num_classes or (known and classes != list(known)):
        raise LeanError(f'{source} was made for {model.num_classes} classes ({", ".join(known or [])[:80]}), the '
                        f'data has {len(classes)} ({", ".join(classes)[:80]}).')
    return loader
