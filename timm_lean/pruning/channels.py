"""Channel pruning of timm models: score, choose, cut, and tell the model what it has now.

Torch-Pruning finds which channels depend on each other (`graph`); choosing is done here, so that no layer is emptied or
silently skipped and grouped convolutions stay valid.
"""
import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from timm.layers import EcaModule

from timm_lean.errors import LeanError
from timm_lean.layers import FilterBasis
from timm_lean.layers.filter_banks import check_finite, find_filter_banks
from timm_lean.layers.lean_report import LeanReport, changed_params, hand_over
from timm_lean.layers.patterns import Patterns, match_names
from timm_lean.measure.report import count_macs, count_params

from .graph import build_graph, channel_groups, classifier_modules, conv_groups, is_consistent
from .importance import SpectralImportance
from .resize import record_resize
from .sizes import ModelSizes
from .spectral import check_criterion
from .tracker import ChannelTracker

__all__ = ['ChannelReport', 'prune_channels']


@dataclass(frozen=True, kw_only=True)
class ChannelReport(LeanReport):
    """What channel pruning did.

    Attributes:
        layers: Layer, output channels before and after, for convolutions and linear layers that lost any.
        unchanged: Layers of groups that lost no channel, and why.
        kept: Of every layer that lost output channels, those of the original that are left.
        kept_inputs: The same for input channels.
        macs: Multiply-accumulates of one input, before and after.
    """
    layers: tuple[tuple[str, int, int], ...]
    unchanged: tuple[tuple[str, str], ...]
    kept: dict[str, list[int]]
    kept_inputs: dict[str, list[int]]
    macs: tuple[int, int]

    def lines(self) -> list[str]:
        width = max([5, *(len(name) for name, *_ in self.layers)])
        lines = [f'{"layer":{width}}  channels']
        lines += [f'{name:{width}}  {before} -> {after}' for name, before, after in self.layers]
        lines += [f'{name}: unchanged, {why}' for name, why in self.unchanged]
        lines.append(f'params {self.params[0]:,} -> {self.params[1]:,} ({self.params[1] / self.params[0]:.3f}x), '
                     f'MACs {self.macs[0]:,} -> {self.macs[1]:,} ({self.macs[1] / max(self.macs[0], 1):.3f}x)')
        return lines


def prune_channels(
        model: nn.Module,
        example_inputs: torch.Tensor,
        *,
        criterion: str = 'spectral_norm',
        pruning_ratio: float = 0.5,
        max_pruning_ratio: float = 0.9,
        global_pruning: bool = False,
        round_to: int = 8,
        iterative_steps: int = 1,
        include: Patterns = None,
        exclude: Patterns = None,
        group_reduction: str = 'mean',
        normalizer: str | Callable[[torch.Tensor], torch.Tensor] | None = 'mean',
        importance: Callable[[Any], torch.Tensor | None] | None = None,
        between_steps: Callable[[nn.Module, int], None] | None = None,
) -> nn.Module:
    """Remove the least important channels of a timm model.

    The classifier's classes are never removed.

    Args:
        model: A model made by `timm.create_model`, pruned before or not.
        example_inputs: An input `[B, C, H, W]` to trace it with, on the model's device.
        criterion: How kernels are scored, see `spectral`.
        pruning_ratio: Share of channels to remove, in (0, 1): of every group of layers, or of all together.
        max_pruning_ratio: Remove at most this share of any group's channels.
        global_pruning: Rank the channels of all groups against each other.
        round_to: Keep multiples of this many channels (at least one such multiple; layers with fewer are left alone).
        iterative_steps: Reach the ratio in so many steps, scoring anew before each.
        include: Shell patterns on the names of modules, a list or joined by `|`: only layers in them lose output
            channels, and only where all layers that must lose the same ones are in them. All if None.
        exclude: Patterns of modules whose layers keep all output channels.
        group_reduction: See `SpectralImportance`.
        normalizer: See `SpectralImportance`.
        importance: Any Torch-Pruning importance instead of the criterion.
        between_steps: Called as `(model, step)` after every step but the last, e.g. to train.

    Returns:
        A new model in the given one's mode, with a `ChannelReport` as `.lean_report`; the given one is unchanged.

    Raises:
        LeanError: A ratio that would empty layers, a model that cannot be traced or whose code fixes channel counts,
            one without a timm name, NaN weights.
    """
    check_criterion(criterion)
    _check(pruning_ratio, round_to, max_pruning_ratio, iterative_steps)
    if not isinstance(example_inputs, torch.Tensor) or example_inputs.ndim != 4:
        raise LeanError('example_inputs must be an image batch [B, C, H, W] as a tensor, got '
                        f'{list(getattr(example_inputs, "shape", [])) or type(example_inputs).__name__}.')
    if any(isinstance(m, EcaModule) for m in model.modules()):
        raise LeanError(f'{type(model).__name__} has ECA attention, a convolution along the channels: removing one '
                        'changes its neighbours. Channel pruning does not support it.')
    check_finite(find_filter_banks(model), 'Channel pruning')
    importance = importance or SpectralImportance(criterion, group_reduction, normalizer)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    new = copy.deepcopy(model)
    x = example_inputs.detach()
    build_graph(new, x)  # fails now, and clearly, if the model cannot be traced
    before = _widths(new)
    cost = count_params(new), count_macs(new, x.shape)
    sizes = ModelSizes.of(new, x)
    tracker = ChannelTracker(new)
    start: dict[nn.Module, int] = {}
    unchanged: dict[str, str] = {}
    for step in range(1, iterative_steps + 1):
        unchanged = _step(
            new, x, importance, pruning_ratio * step / iterative_steps, global_pruning, round_to, max_pruning_ratio,
            [*classifier_modules(new), *_ignored(new, include, exclude)], start, tracker)
        if between_steps is not None and step < iterative_steps:
            between_steps(new, step)
    for name, p in new.named_parameters():
        p.requires_grad_(flags[name])
    try:
        sizes.update(new, x)
        cost = (cost[0], count_params(new), cost[1], count_macs(new, x.shape))  # type: ignore[assignment]
    except Exception as e:  # the model's own code meets channel counts it did not expect
        raise LeanError(f'{type(model).__name__} cannot run with fewer channels, its code fixes them: '
                        f'{type(e).__name__}: {str(e).partition(chr(10))[0][:200]}. Name the layers to leave alone by '
                        'exclude.') from e
    record_resize(new)
    after = _widths(new)
    report = ChannelReport(
        params=cost[:2], macs=cost[2:], touched=changed_params(model, new),  # type: ignore[arg-type]
        kept=tracker.kept, kept_inputs=tracker.kept_inputs,
        layers=tuple((name, before[name], after[name]) for name in before if before[name] != after[name]),
        unchanged=tuple(unchanged.items()))
    return hand_over(new.train(model.training), report, 'Channel pruning')


def _check(ratio: float, round_to: int, max_ratio: float, iterative_steps: int) -> None:
    if not 0 < ratio < 1:
        raise LeanError(f'pruning_ratio must be above 0 and below 1 (1 would empty the layers), got {ratio!r}.')
    if not 0 < max_ratio < 1 or ratio > max_ratio:
        raise LeanError(f'max_pruning_ratio must be below 1 and at least pruning_ratio={ratio:g}, got {max_ratio!r}.')
    for name, value in (('round_to', round_to), ('iterative_steps', iterative_steps)):
        if type(value) is not int or value < 1:
            raise LeanError(f'{name} must be a whole number of at least 1, got {value!r}.')


def _ignored(model: nn.Module, include: Patterns, exclude: Patterns) -> set[nn.Module]:
    """The modules whose output channels stay: all in modules that `exclude` names, or outside those of `include`."""
    modules = dict(model.named_modules())
    wanted, unwanted = ({m for name in match_names(patterns, list(modules), 'Channel pruning', option, 'module')
                         for m in modules[name].modules()}
                        for option, patterns in (('include', include), ('exclude', exclude)))
    return unwanted | (set() if include is None else set(modules.values()) - wanted)


def _step(
        model: nn.Module, x: torch.Tensor, importance: Callable[[Any], torch.Tensor | None], ratio: float,
        global_pruning: bool, round_to: int, max_ratio: float, ignored: list[nn.Module], start: dict[nn.Module, int],
        tracker: ChannelTracker,
) -> dict[str, str]:
    """Bring every group down to `ratio` of what it had at the start; returns the groups left alone and why."""
    graph = build_graph(model, x)
    names = {m: name for name, m in model.named_modules()}
    plans = []
    kept: dict[str, str] = {}
    for group in channel_groups(graph, ignored):
        root = group[0].dep.target.module
        name = names.get(root, '?')
        if not is_consistent(group):
            kept[name] = 'the code pads, slices or splits its channels'
            continue
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            values = importance(group)
        if values is None:
            kept[name] = 'nothing to score'
            continue
        if not bool(torch.isfinite(values).all()):
            raise LeanError(f'The importance of the channels of {name!r} is not finite. A normalizer divides by zero '
                            'where all kernels are zero; choose normalizer=None.')
        parts = conv_groups(graph, group)
        plans.append((group, root, parts, values.view(parts, -1).mean(0).cpu().double()))
    if not plans:
        reasons = '; '.join(f'{name}: {why}' for name, why in list(kept.items())[:3])
        shared = any(isinstance(m, FilterBasis) for m in model.modules())
        hint = ' Layers that share a basis lose the same inputs; one that cannot lose any keeps those of all.'
        raise LeanError(f'{type(model).__name__} has no channels to prune: '
                        f'{reasons or "all groups are left out or reach the output"}.{hint if shared else ""}')
    for _, root, parts, values in plans:
        start.setdefault(root, len(values) * parts)
    limit = None
    if global_pruning:
        ranked = torch.cat([v.repeat_interleave(parts) for _, _, parts, v in plans]).sort().values
        gone = len(ranked) - round((1 - ratio) * sum(start[root] for _, root, *_ in plans))
        limit = float(ranked[gone - 1]) if gone > 0 else -math.inf
    for group, root, parts, values in plans:
        name, total, each = names.get(root, '?'), start[root] // parts, len(values)
        keep = int((values > limit).sum()) if limit is not None else round(total * (1 - ratio))
        unit = round_to // math.gcd(round_to, parts)
        floor = max(unit, math.ceil((1 - max_ratio) * total - 1e-9))
        keep = max(round(keep / unit), math.ceil(floor / unit)) * unit
        if keep >= each:
            kept[name] = f'{each * parts} channels stay by round_to={round_to} and max_pruning_ratio={max_ratio:g}'
            continue
        lowest = values.argsort(stable=True)[:each - keep]
        indices = torch.cat([lowest + part * each for part in range(parts)]).sort().values.tolist()
        cut = graph.get_pruning_group(root, group[0].dep.handler, indices)
        if not graph.check_pruning_group(cut):
            kept[name] = 'a layer that depends on it would be empty'
            continue
        tracker.cut(cut)
    return kept


def _widths(model: nn.Module) -> dict[str, int]:
    kinds = (nn.Conv2d, nn.Linear, FilterBasis)
    return {name: len(m.weight) for name, m in model.named_modules() if isinstance(m, kinds)}
