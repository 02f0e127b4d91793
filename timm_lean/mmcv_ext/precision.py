"""The number format the stand-in's kernels compute in.

mmcv's Python hands over what the network produced: fp16 or bf16 under autocast, float64 in a gradient check.
torchvision has no bf16 CPU kernels and sums half-precision gradients in half precision, so every kernel here computes
in float32 (float64 where a float64 tensor comes in) and casts once, when it writes into the buffer mmcv passed.
Autocast is off inside: it is still on in the forward of mmcv's autograd functions, and would cast matmul-like steps
back to half.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ['exact', 'widen']

P = ParamSpec('P')
R = TypeVar('R')


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors to one compute format.

    Args:
        *tensors: Floating point (or integer) tensors of any shapes.

    Returns:
        The same tensors as float64 if one of them is float64, else as float32; not copied where the format is right
        already.
    """
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    return tuple(tensor.to(wide) for tensor in tensors)


def exact(kernel: Callable[P, R]) -> Callable[P, R]:
    """Run a kernel without autocast and without recording gradients.

    Args:
        kernel: A function whose first argument is a tensor; its device is the one autocast is switched off for.

    Returns:
        The wrapped function, same signature.
    """

    @functools.wraps(kernel)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, Tensor)
        with torch.no_grad(), torch.autocast(device_type=first.device.type, enabled=False):
            return kernel(*args, **kwargs)

    return run
