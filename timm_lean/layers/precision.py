"""Half precision is for use: what computes new weights needs float32."""
import torch
import torch.nn as nn

from timm_lean.errors import LeanError

__all__ = ['check_float32']


def check_float32(model: nn.Module, verb: str) -> None:
    """Refuse a network in half precision.

    Args:
        model: The network.
        verb: What is about to be done to it.

    Raises:
        LeanError: It has parameters in float16 or bfloat16; names the order that works.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            dtype = str(parameter.dtype).removeprefix('torch.')
            raise LeanError(f'{verb}() needs float32, and {name} is {dtype}: {verb}(), then half().')
