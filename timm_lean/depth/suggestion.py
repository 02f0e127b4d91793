"""The network that a depth bound suggests, beside the one it is compared with."""
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from timm.models import get_model_input_config

from timm_lean.errors import LeanError
from timm_lean.measure import count_macs, count_params, measure_steps
from timm_lean.measure.conv_depth import conv_depth

from .family import Budget, bounded_model, describe_member

__all__ = ['ModelRow', 'suggest']


@dataclass
class ModelRow:
    """What one of the compared models is and costs.

    Attributes:
        role: 'baseline' or 'suggested'.
        model: timm name or file.
        model_args: Arguments of the name.
        depth: Convolutions on the longest path.
        params: Parameters.
        macs: Multiply-accumulates of one image.
        step_ms: Median milliseconds of a training step, None if not measured.
    """
    role: str
    model: str
    model_args: dict[str, Any]
    depth: int
    params: int
    macs: int
    step_ms: float | None = None


def suggest(
        bound: int,
        baseline: nn.Module,
        *,
        baseline_name: str,
        img_size: int,
        num_classes: int,
        in_chans: int = 3,
        family: str = 'resnet',
        budget: Budget | str | None = None,
        batch_size: int = 32,
        device: torch.device | str = 'cpu',
) -> list[ModelRow]:
    """The baseline and the widest member of a family within a bound and a budget, measured.

    Args:
        bound: The most convolution layers on the longest path.
        baseline: The network to compare with.
        baseline_name: What it is called.
        img_size: Side of the images in pixels.
        num_classes: Number of classes.
        in_chans: Channels of the images.
        family: See `bounded_model`.
        budget: See `bounded_model`; the baseline's parameters if None.
        batch_size: Of the measured training step; 0 measures none.
        device: Where training steps are measured.

    Raises:
        LeanError: A baseline of other channels, or a bound or budget that cannot be met.
    """
    if (channels := get_model_input_config(baseline)['input_size'][0]) != in_chans:
        raise LeanError(f'The baseline {baseline_name} takes {channels} channels, the images have {in_chans}. Choose '
                        'another --baseline.')
    wanted = (family, bound, budget, num_classes, img_size, in_chans, baseline)
    name, arguments = describe_member(*wanted)
    suggested = bounded_model(*wanted)
    shape = (in_chans, img_size, img_size)
    rows = [
        _row('baseline', baseline_name, {} if in_chans == 3 else {'in_chans': in_chans}, baseline, shape),
        _row('suggested', name, {k: v for k, v in arguments.items() if k != 'num_classes'}, suggested, shape)]
    if batch_size:
        times = measure_steps([baseline, suggested], (batch_size, *shape), torch.device(device))
        for row, timing in zip(rows, times, strict=True):
            row.step_ms = 1000 * timing.median
    return rows


def _row(role: str, name: str, args: dict[str, Any], model: nn.Module, shape: tuple[int, int, int]) -> ModelRow:
    return ModelRow(role, name, args, conv_depth(model, shape), count_params(model), count_macs(model, (1, *shape)))
