"""The member of a family of networks that is no deeper than a bound and as wide as a budget allows.

Source of the idea: https://arxiv.org/abs/2106.14190 (shallower and wider than the published networks, at equal cost).
Depth is decided first, then the width is the largest whose cost stays within the budget.
"""
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn as nn

from timm_lean.checkpoint.recipe import Recipe, build
from timm_lean.errors import LeanError
from timm_lean.measure import count_macs, count_params

from .bound import resolutions

__all__ = ['FAMILIES', 'Budget', 'Family', 'bounded_model', 'check_family', 'default_baseline',
           'describe_member', 'list_families']

LARGE_IMAGES = 64  # pixels; images beyond get a stem that reduces the resolution
_MAX_WIDTH = 4096  # of the first stage; far beyond any sensible network, an end for the search


@dataclass(frozen=True)
class Budget:
    """What a network may cost.

    Args:
        value: Parameters, or multiply-accumulates of one image.
        kind: 'params' or 'macs' (as `timm_lean.measure` counts them).
    """
    value: int
    kind: str = 'params'

    def __post_init__(self) -> None:
        if self.kind not in ('params', 'macs'):
            raise LeanError(f"A budget is of 'params' or 'macs', got {self.kind!r}.")
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < 1:
            raise LeanError(f'A budget must be a whole number of at least 1, got {self.value!r}.')

    @classmethod
    def parse(cls, text: str) -> 'Budget':
        """'853018', '0.85M', 'params=850k', 'macs=125M'."""
        kind, sep, number = text.partition('=')
        if not sep:
            kind, number = 'params', text
        factor = {'k': 1e3, 'M': 1e6, 'G': 1e9}.get(number[-1:], 1)
        try:
            value = float(number[:-1] if factor > 1 else number) * factor
            return cls(round(value), kind)
        except (ValueError, OverflowError) as e:
            if isinstance(e, LeanError):
                raise
            raise LeanError(f'A budget reads like 850k, params=0.85M or macs=125M, got {text!r}.') from None

    def cost(self, model: nn.Module, in_chans: int, img_size: int) -> int:
        """What a model takes of the budget's kind."""
        if self.kind == 'params':
            return count_params(model)
        return count_macs(model, (1, in_chans, img_size, img_size))

    def __str__(self) -> str:
        return f'{self.value:,} {"parameters" if self.kind == "params" else "MACs"}'


@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family's depth is composed, and its arguments from layers and width.

    Attributes:
        model: Its timm name.
        arguments: `(layers, first width, large images) -> arguments` of the timm name.
        block: Convolutions of a block on the longest path.
        first: Those of a block of the first stage; as in the others if None.
        outside: Convolutions before and behind the stages.
        between: Convolutions between two stages.
        min_blocks: Blocks a stage must have.
        large_stem: `stem_stride` for large images.
    """
    model: str
    arguments: Callable[[tuple[int, ...], int, bool], dict[str, Any]]
    block: int
    first: int | None = None
    outside: int = 1
    between: int = 0
    min_blocks: int = 1
    large_stem: int = 4

    def depth(self, layers: Sequence[int]) -> int:
        """Convolutions on the longest path; what `conv_depth` counts."""
        first = self.block if self.first is None else self.first
        return self.outside + first * layers[0] + self.block * sum(layers[1:]) + self.between * (len(layers) - 1)

    def layers(self, depth: int, img_size: int) -> tuple[int, ...]:
        """As many stages as the image has resolutions for, filled evenly with blocks, the later stages first.

        Raises:
            LeanError: Not even one stage fits.
        """
        large = img_size > LARGE_IMAGES
        # the stem with stride 4 passes one resolution by itself; beyond an output stride of 32 there is little to see
        stages = min(resolutions(img_size) - (large and self.large_stem == 4), 4 if self.large_stem == 4 else 5)
        while stages > 1 and self.depth((self.min_blocks,) * stages) > depth:
            stages -= 1
        layers = [self.min_blocks] * max(stages, 1)
        if (least := self.depth(layers)) > depth:
            raise LeanError(f'The shallowest {self.model} has {least} convolution layers, the bound is {depth}. The '
                            f'nearest depth that can be met is {least}.')
        while True:
            order = sorted(range(len(layers)), key=lambda i: (layers[i], -i))
            for i in order:
                if self.depth([n + (j == i) for j, n in enumerate(layers)]) <= depth:
                    layers[i] += 1
                    break
            else:
                return tuple(layers)


def _widths(stages: int, first: int, step: int = 0) -> tuple[int, ...]:
    """Widths that double from stage to stage, rounded to what hardware likes."""
    result = []
    for i in range(stages):
        width = first * 2 ** i
        divisor = step or (8 if width >= 64 else 4)
        result.append(max(divisor, int(width / divisor + 0.5) * divisor))
    return tuple(result)


def _resnet(layers: tuple[int, ...], width: int, large: bool) -> dict[str, Any]:
    return dict(layers=layers, widths=_widths(len(layers), width))


def _resnext(layers: tuple[int, ...], width: int, large: bool) -> dict[str, Any]:
    cardinality = 32 if large else 8
    return dict(layers=layers, widths=_widths(len(layers), width, 2 * cardinality), cardinality=cardinality)


def _shared_resnet(layers: tuple[int, ...], width: int, large: bool) -> dict[str, Any]:
    widths = _widths(len(layers), width)
    return dict(layers=layers, widths=widths, shared_rank=widths[0], unique_rank=1)


def _densenet(layers: tuple[int, ...], width: int, large: bool) -> dict[str, Any]:
    return dict(layers=layers, growth=2 * width)


FAMILIES = {
    'resnet': Family(model='lean_resnet', arguments=_resnet, block=2),
    'resnext': Family(model='lean_resnext', arguments=_resnext, block=3),
    'densenet': Family(model='lean_densenet', arguments=_densenet, block=2, between=1),
    'efficientnet': Family(
        model='lean_efficientnet', arguments=_resnet, block=5, first=4, outside=2, large_stem=2),
    'mobilenetv2': Family(model='lean_mobilenetv2', arguments=_resnet, block=3, first=2, outside=2, large_stem=2),
    'shared_resnet': Family(model='lean_shared_resnet', arguments=_shared_resnet, block=2, min_blocks=2),
}


def list_families() -> list[str]:
    """Names of the families, sorted."""
    return sorted(FAMILIES)


def check_family(family: str) -> None:
    """Raise a LeanError that lists the families unless this is one."""
    if family not in FAMILIES:
        raise LeanError(f'Unknown family {family!r}. Known: {", ".join(list_families())}.')


def default_baseline(img_size: int) -> str:
    """The published network that images of a size are compared on."""
    return 'resnet50' if img_size > LARGE_IMAGES else 'resnet56_cifar'


def describe_member(
        family: str,
        depth: int,
        budget: Budget | str | int | None = None,
        num_classes: int = 10,
        img_size: int = 32,
        in_chans: int = 3,
        baseline: nn.Module | str | None = None,
) -> tuple[str, dict[str, Any]]:
    """The timm name and arguments of `bounded_model(...)`, without its weights.

    Raises:
        LeanError: An unknown family, or a depth or budget that cannot be met; the message says the nearest that can.
    """
    check_family(family)
    for name, value in (('depth', depth), ('num_classes', num_classes), ('img_size', img_size), ('in_chans', in_chans)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise LeanError(f'{name} must be a whole number of at least 1, got {value!r}.')
    member, large = FAMILIES[family], img_size > LARGE_IMAGES
    layers = member.layers(depth, img_size)
    limit = _resolve_budget(budget, baseline, num_classes, img_size, in_chans)

    def arguments(width: int) -> dict[str, Any]:
        extra: dict[str, Any] = dict(stem_stride=member.large_stem) if large else {}
        if in_chans != 3:
            extra['in_chans'] = in_chans
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in member.arguments(layers, width, large).items()}
        return {**plain, **extra, 'num_classes': num_classes}

    def cost(width: int) -> int:
        with torch.device('meta'):
            return limit.cost(timm.create_model(member.model, **arguments(width)), in_chans, img_size)

    low = 1  # the widest known to fit
    if (least := cost(low)) > limit.value:
        raise LeanError(f'The narrowest {member.model} with layers={list(layers)} costs {Budget(least, limit.kind)}, '
                        f'the budget is {limit}. The nearest that can be met is {limit.kind}={least}; a lower depth '
                        'needs less.')
    high = 2
    while cost(high) <= limit.value:
        low, high = high, 2 * high
        if high > _MAX_WIDTH:
            raise LeanError(f'With layers={list(layers)} {member.model} would be wider than {_MAX_WIDTH} channels to '
                            f'use a budget of {limit}. The nearest that can be met is {limit.kind}={cost(low)}.')
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) <= limit.value else (low, middle)
    return member.model, arguments(low)


def bounded_model(
        family: str,
        depth: int,
        budget: Budget | str | int | None = None,
        num_classes: int = 10,
        img_size: int = 32,
        in_chans: int = 3,
        baseline: nn.Module | str | None = None,
) -> nn.Module:
    """Create the widest member of a family within a depth and a budget.

    Args:
        family: One of `list_families()`.
        depth: The most convolution layers on the longest path, e.g. from `depth_bound`.
        budget: A `Budget`, its text ('macs=125M'), or a number of parameters; the parameters of `baseline` if None.
        num_classes: Number of classes.
        img_size: Side of the images in pixels; decides the number of stages and the stem.
        in_chans: Number of input channels.
        baseline: A network or a timm name; `resnet56_cifar` up to 64 pixels and `resnet50` beyond if None.

    Returns:
        A timm model, newly initialized; its name and arguments are in its recipe, so it saves and loads like any other.

    Raises:
        LeanError: See `describe_member`.
    """
    name, arguments = describe_member(family, depth, budget, num_classes, img_size, in_chans, baseline)
    model: Any = timm.create_model(name, **arguments)
    stride = model.feature_info[-1]['reduction']
    cfg = {**model.pretrained_cfg, 'input_size': (in_chans, img_size, img_size),
           'pool_size': (math.ceil(img_size / stride),) * 2}
    model.pretrained_cfg = model.default_cfg = cfg
    return model


def _resolve_budget(
        budget: Budget | str | int | None,
        baseline: nn.Module | str | None,
        num_classes: int,
        img_size: int,
        in_chans: int,
) -> Budget:
    if isinstance(budget, Budget):
        return budget
    if isinstance(budget, str):
        return Budget.parse(budget)
    if budget is not None:
        return Budget(budget)
    if baseline is None or isinstance(baseline, str):
        extra = {} if in_chans == 3 else {'in_chans': in_chans}
        with torch.device('meta'):
            baseline = build(Recipe(baseline or default_baseline(img_size), {'num_classes': num_classes, **extra}))
    return Budget(count_params(baseline))
