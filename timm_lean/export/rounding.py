"""A network as its file in int8 will hold it, repaired by images: the rounding of weights as one more step.

`save_model(model, path, weights='int8')` rounds each weight to the nearest of 255 values of its filter. What that moves
an output by on average can be taken back without leaving the grid: front to back, each bias, or the mean that the batch
norm behind subtracts, becomes what least squares on the rounded network's own inputs says, and where it helps batch
norms are measured anew (see `calibration`). Such a network is stored in int8 without any further loss.
"""
import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

from timm_lean.calibration import Calibration, calibrate
from timm_lean.checkpoint.int8 import LayerError, dequantize, quantize
from timm_lean.layers.lean_report import LeanReport, hand_over
from timm_lean.measure import count_params

__all__ = ['RoundingReport', 'round_weights']


@dataclass(frozen=True, kw_only=True)
class RoundingReport(LeanReport):
    """What `round_weights` did.

    Attributes:
        layers: The error of each rounded weight.
        output_error: Relative error of the network's output on held-out images, rounded and repaired; None without
            images.
    """
    layers: tuple[LayerError, ...]
    output_error: tuple[float, float] | None = None

    def lines(self) -> list[str]:
        largest = max((layer.error for layer in self.layers), default=0.)
        lines = [f'{len(self.layers)} weights rounded to int8, errors up to {100 * largest:.2f} %']
        if self.output_error is not None:
            before, after = self.output_error
            lines.append(f'error of the output {100 * before:.3f} % -> {100 * after:.3f} %')
        return lines


def round_weights(model: nn.Module, *, calibration: Calibration | Iterable[Any] | None = None) -> nn.Module:
    """Round weights to what a file in int8 holds of them: convolutions, bases, coefficients, linear layers.

    Args:
        model: The network, or a detector by way of `lean_detector`; it is not changed. Pruned kernels stay zero.
        calibration: A few hundred images as batches `[B, C, H, W]`, or tuples that start with them: biases and means
            of batch norms make up for what the rounding moves, see `calibrate`.

    Returns:
        A new network in the given one's mode, with a `RoundingReport` as `.lean_report`. It computes in floats;
        `save_model(new, path, weights='int8')` stores it without changing it.

    Raises:
        LeanError: Weights that are not finite.
    """
    new, tensors = copy.deepcopy(model), dict(model.state_dict())
    small, names, report = quantize(tensors)
    new.load_state_dict({**tensors, **{name: dequantize(name, small.__getitem__) for name in names}})
    error = None
    if calibration is not None:
        new = calibrate(new, model, calibration, biases_only=True)
        done: Any = new.calibration_report
        error = done.before, done.after
    count = count_params(model)
    return hand_over(new, RoundingReport(params=(count, count), layers=report.layers, output_error=error), 'Rounding')
