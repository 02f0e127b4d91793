"""Data-free initialization by Convolutional Similarity.

Paper: Belmekki et al. 2024, the iterative initialization
- https://arxiv.org/abs/2411.03226

Before training, the Convolutional Similarity of the fresh weights is minimized alone for a number of steps. The
similarity is of fourth order in the weights: shrinking them lowers it without making any two filters less alike.
`keep_norm` therefore gives every filter bank its norm back after each step.
"""
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from tqdm import tqdm

from timm_lean.errors import LeanError
from timm_lean.layers.patterns import Patterns

from .conv_similarity import ConvSimilarity

__all__ = ['initialize_conv_similarity']

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    'adam': torch.optim.Adam,
    'rmsprop': torch.optim.RMSprop,
    'sgd': torch.optim.SGD,
}


def initialize_conv_similarity(
        model: nn.Module,
        steps: int,
        lr: float = 0.002,
        optimizer: str = 'adam',
        tol: float | None = None,
        keep_norm: bool = True,
        progress: bool = False,
        pairs: str = 'all',
        include: Patterns = None,
        exclude: Patterns = None,
        skip_stem: bool = False,
        skip_1x1: bool = False,
) -> list[float]:
    """Lower the Convolutional Similarity of a model's filters, in place and without data.

    Only convolution weights with `requires_grad` change. Deterministic: equal weights give equal results.

    Args:
        model: The model, usually fresh.
        steps: Number of optimizer steps.
        lr: Learning rate.
        optimizer: `'adam'`, `'rmsprop'` or `'sgd'`, without weight decay.
        tol: Stop after a step that changes the similarity by less than this fraction.
        keep_norm: Rescale every filter bank to its first norm after each step. Without it the similarity falls mostly
            because the weights shrink.
        progress: Show a progress bar on stderr.
        pairs: `'all'` or `'adjacent'`, see `conv_similarity`.
        include, exclude, skip_stem, skip_1x1: See `find_filter_banks`.

    Returns:
        The similarity (raw sum) before the first and after every step: at most `steps + 1` values.

    Raises:
        LeanError: A bad argument, a model with nothing to compare, or a similarity that became infinite or NaN.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise LeanError(f'The number of initialization steps must be a whole number of at least 0, got {steps!r}.')
    if not math.isfinite(lr) or lr <= 0:
        raise LeanError(f'The learning rate of the initialization must be a number above 0, got {lr!r}.')
    if tol is not None and not tol > 0:
        raise LeanError(f'tol must be a number above 0, got {tol!r}.')
    if optimizer not in _OPTIMIZERS:
        raise LeanError(f'Unknown optimizer {optimizer!r} for the initialization. Known: {", ".join(_OPTIMIZERS)}.')

    regularizer = ConvSimilarity(1.0, pairs, False, include, exclude, skip_stem, skip_1x1)
    banks = [bank for bank in regularizer.find(model) if bank.weight.requires_grad]
    weights = [bank.weight for bank in banks]
    if not weights:
        raise LeanError('Initialization by conv_similarity: every convolution is frozen (requires_grad=False).')
    if not all(weight.is_leaf for weight in weights):
        raise LeanError('Initialization by conv_similarity cannot set parametrized weights (torch.nn.utils.'
                        'parametrizations); initialize the model before parametrizing it.')
    norms = [weight.detach().norm() for weight in weights]
    optim = _OPTIMIZERS[optimizer](weights, lr=lr)
    kept_grads = [weight.grad for weight in weights]
    trace: list[float] = []
    bar = tqdm(total=steps, desc='conv_similarity init', disable=not progress)
    try:
        with torch.enable_grad():
            for step in range(steps + 1):
                value = regularizer.compute(banks)
                trace.append(_finite(value.item(), step))
                bar.set_postfix(similarity=f'{trace[-1]:.4g}')
                if step == steps or (tol and step and abs(trace[-2] - trace[-1]) < tol * abs(trace[-2])):
                    break
                _step(optim, weights, value)
                if keep_norm:
                    _restore_norms(weights, norms)
                bar.update()
    finally:
        bar.close()
        for weight, grad in zip(weights, kept_grads, strict=True):
            weight.grad = grad
    return trace


def _step(optim: torch.optim.Optimizer, weights: list[Any], value: torch.Tensor) -> None:
    for weight, grad in zip(weights, torch.autograd.grad(value, weights), strict=True):
        weight.grad = grad
    optim.step()


@torch.no_grad()
def _restore_norms(weights: list[Any], norms: list[torch.Tensor]) -> None:
    for weight, norm in zip(weights, norms, strict=True):
        now = weight.norm()
        weight.mul_(torch.where(now > 0, norm / now, 1.0))


def _finite(value: float, step: int) -> float:
    if not math.isfinite(value):
        raise LeanError(f'Initialization by conv_similarity diverged at step {step}: the similarity is {value}. '
                        'Use a smaller learning rate.')
    return value
