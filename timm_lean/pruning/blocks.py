"""Removing residual blocks: the technique that buys latency.

A residual block `x + F(x)` can go where its input is its shortcut and its output has the input's shape; the network
then passes the input on. https://arxiv.org/abs/2106.14190 holds that beyond some depth blocks do little else. Blocks
are ranked by what their removal does to the network's output, one by one, and after each the layers that are left are
calibrated.
"""
import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from timm.models import get_model_input_config
from timm.utils import unwrap_model
from torch.overrides import TorchFunctionMode

from timm_lean.calibration import calibrate
from timm_lean.checkpoint.recipe import record_step, register_step
from timm_lean.errors import LeanError
from timm_lean.layers.lean_report import LeanReport, hand_over
from timm_lean.layers.patterns import Patterns, match_names, some_names
from timm_lean.measure.counts import count_macs, count_params
from timm_lean.measure.latency import measure_latency

__all__ = ['BlockReport', 'find_blocks', 'remove_blocks']

STEP = 'remove_blocks'
_RANKING_IMAGES = 128
_ADDITIONS = {'add', 'add_', '__add__', '__iadd__', '__radd__'}


@dataclass(frozen=True, kw_only=True)
class BlockReport(LeanReport):
    """What block removal did.

    Attributes:
        removed: Blocks in the order in which they went; with each the relative error of the network's output when it
            was removed, before calibration, and how much the block changed its input, `||y - x|| / ||x||`. Both None
            without images.
        macs: Multiply-accumulates of one image, before and after.
        latency_ms: Milliseconds of one image, before and after, on the network's device.
    """
    removed: tuple[tuple[str, float | None, float | None], ...]
    macs: tuple[int, int]
    latency_ms: tuple[float, float]

    def lines(self) -> list[str]:
        width = max([5, *(len(name) for name, *_ in self.removed)])
        lines = [f'{"block":{width}}  output error without it  change of its input']
        for name, error, change in self.removed:
            cells = ['-' if value is None else f'{value:.4f}' for value in (error, change)]
            lines.append(f'{name:{width}}  {cells[0]:>23}  {cells[1]:>19}')
        lines += super().lines()
        lines.append(f'MACs {self.macs[0]:,} -> {self.macs[1]:,} ({self.macs[1] / max(self.macs[0], 1):.3f}x), '
                     f'{self.latency_ms[0]:.2f} -> {self.latency_ms[1]:.2f} ms')
        return lines


def remove_blocks(
        model: nn.Module,
        *,
        count: int | None = None,
        blocks: Sequence[str] | None = None,
        ratio: float | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        calibration: Iterable[Any] | None = None,
) -> nn.Module:
    """Remove residual blocks. Give exactly one of `count`, `blocks` and `ratio`.

    Args:
        model: The trained network; it is not changed.
        count: So many blocks, those whose removal changes the output least.
        blocks: These blocks, in this order.
        ratio: This share of the blocks that could go, in (0, 1].
        include: Shell patterns on the names of blocks that may go, a list or joined by `|`; all if None.
        exclude: Patterns of those that stay.
        calibration: A few hundred images as batches `[B, C, H, W]`, or tuples that start with them: the blocks are
            ranked by them, and the layers that are left make up for each that went, see `calibrate`. Only `blocks` can
            do without.

    Returns:
        A new network in the mode of the given one, with a `BlockReport` as `.lean_report`.

    Raises:
        LeanError: Contradicting arguments, blocks that cannot go, or more than there are.
    """
    given = {k: v for k, v in dict(count=count, blocks=blocks, ratio=ratio).items() if v is not None}
    if len(given) != 1:
        raise LeanError(f'Block removal needs exactly one of count, blocks and ratio, got {given or "none"}.')
    if blocks is None and calibration is None:
        raise LeanError(f'Block removal by {next(iter(given))} needs calibration=LOADER: blocks are ranked by what their '
                        'removal does to images. Or name them: blocks=[...].')
    model = unwrap_model(model)
    batches = None if calibration is None else list(calibration)
    images = None if batches is None else _some_images(model, batches)
    x = images[:1] if images is not None else _example(model)
    candidates = find_blocks(model, x)
    names = [name for name in candidates if include is None or name in match_names(
        include, candidates, 'Block removal', 'include', 'removable block')]
    left_out = match_names(exclude, candidates, 'Block removal', 'exclude', 'removable block')
    names = [name for name in names if name not in left_out]
    wanted = _wanted(model, names, count, blocks, ratio)
    new = copy.deepcopy(model)
    removed: list[tuple[str, float | None, float | None]] = []
    while len(removed) < (len(wanted) if blocks is not None else wanted[0]):
        left = [name for name in names if name not in {done for done, *_ in removed}]
        errors: dict[str, float] = {}
        if images is not None:
            choice = [wanted[len(removed)]] if blocks is not None else left
            errors = _errors_without(new, model, choice, images)
        name = wanted[len(removed)] if blocks is not None else min(errors, key=lambda n: errors[n])
        change = None if images is None else _change(new, name, images)
        _remove(new, [name])
        if batches is not None:
            new = calibrate(new, model, batches)
        removed.append((name, errors.get(name), change))
    record_step(new, STEP, blocks=[name for name, *_ in removed])
    before, after = (copy.deepcopy(network) for network in (model, new))
    latency = measure_latency([before, after], [x.shape] * 2, x.device)
    report = BlockReport(
        params=(count_params(model), count_params(new)), macs=(count_macs(model, x.shape), count_macs(new, x.shape)),
        removed=tuple(removed), latency_ms=(1000 * latency[0].median, 1000 * latency[1].median))
    return hand_over(new, report, 'Block removal')
