"""Channel pruning of timm models: score, choose, cut, and tell the model what it has now.

Torch-Pruning finds which channels depend on each other (`graph`); choosing is done here, so that no layer is emptied or
silently skipped and grouped convolutions stay valid.
"""
import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from timm_lean.calibration import Calibration, calibrate, output_scores
from timm_lean.errors import LeanError
from timm_lean.layers import SharedBasisConv2d
from timm_lean.layers.classifier import classifier_modules
from timm_lean.layers.filter_banks import check_finite, find_filter_banks
from timm_lean.layers.lean_report import LeanReport, changed_params, hand_over
from timm_lean.layers.patterns import Patterns, match_names
from timm_lean.layers.precision import check_float32
from timm_lean.measure import count_macs, count_params

from .graph import (
    ALONG_CHANNELS,
    build_graph,
    channel_group,
    channel_groups,
    conv_groups,
    is_consistent,
    output_layers,
    unknown_layer,
)
from .importance import OutputImportance, SpectralImportance
from .resize import record_resize
from .sizes import ModelSizes
from .spectral import check_criterion
from .tracker import ChannelTracker
from .trial import EMPTY, failing_cuts

__all__ = ['ChannelReport', 'prune_channels']

_BY_IMAGES = 'output'
_FIXED = "the network's code fixes its channels"


@dataclass(frozen=True, kw_only=True)
class ChannelReport(LeanReport):
    """What channel pruning did.

    Attributes:
        layers: Layer, output channels before and after, for convolutions and linear layers that lost any.
        unchanged: Layers of groups that lost no channel, and why.
        kept: Of every layer that lost output channels, those of the given model that are left.
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
        scores: Mapping[str, torch.Tensor] | None = None,
        between_steps: Callable[[nn.Module, int], None] | None = None,
        calibration: Calibration | Iterable[Any] | None = None,
) -> nn.Module:
    """Remove the least important channels of a timm model.

    The classifier's classes are never removed; of a network that is none, whatever it gives back.

    Args:
        model: A model made by `timm.create_model`, pruned before or not, or any other network that maps an image batch
            to tensors.
        example_inputs: An input `[B, C, H, W]` to trace it with, on the model's device.
        criterion: How kernels are scored, see `spectral`; or 'output', which needs `calibration`: by how much the
            output error of the layers that read a channel grows if it goes (`calibration.output_scores`).
        pruning_ratio: Share of channels to remove, in (0, 1): of every group of layers, or of all together.
        max_pruning_ratio: Remove at most this share of any group's channels.
        global_pruning: Rank the channels of all groups against each other.
        round_to: Keep multiples of this many channels (at least one such multiple; layers with fewer are left alone).
        iterative_steps: Reach the ratio in so many steps, scoring anew before each.
        include: Shell patterns on the names of modules, a list or joined by `|`: only layers in them lose output
            channels, and only where all layers that must lose the same ones are in them. All if None.
        exclude: Patterns of modules whose layers keep all output channels.
        group_reduction: See `SpectralImportance`; has no effect with 'output'.
        normalizer: See `SpectralImportance`.
        importance: Any Torch-Pruning importance instead of the criterion.
        scores: For 'output' in one step: what `calibration.output_scores` gave for this network before.
        between_steps: Called as `(model, step)` after every step but the last, e.g. to train.
        calibration: A few hundred images as batches `[B, C, H, W]`, or tuples that start with them: the channels that
            are left make up for those that went, see `calibrate`.

    Returns:
        A new model in the given one's mode, with a `ChannelReport` as `.lean_report`; the given one is unchanged.

    Raises:
        LeanError: A ratio that would empty layers, a model that cannot be traced, or cannot run with fewer channels,
            one without a timm name, NaN weights.
    """
    if calibration is not None:
        calibration = Calibration.of(calibration).hold()
    if criterion != _BY_IMAGES:
        check_criterion(criterion)
    elif calibration is None and scores is None:
        raise LeanError("criterion='output' needs calibration=LOADER (--data-dir DIR), whose images say what a channel "
                        'does.')
    if scores is not None and (criterion != _BY_IMAGES or iterative_steps != 1):
        raise LeanError("scores are for criterion='output' and one step: after each the network is another one.")
    _check(pruning_ratio, round_to, max_pruning_ratio, iterative_steps)
    check_float32(model, 'prune_channels')
    _check_model(model, example_inputs)
    limits = _Limits(global_pruning, round_to, max_pruning_ratio)
    new = copy.deepcopy(model)
    x = example_inputs.detach()
    graph = build_graph(new, x)  # fails now, and clearly, if the model cannot be traced
    macs, sizes, tracker = count_macs(new, x.shape), ModelSizes.of(new, x), ChannelTracker(new)
    given_back = classifier_modules(new) if hasattr(new, 'get_classifier') else output_layers(graph)
    ignored = {*given_back, *_ignored(new, include, exclude)}
    start: dict[str, int] = {}

    def choice() -> SpectralImportance:
        if criterion != _BY_IMAGES:
            return SpectralImportance(criterion, group_reduction, normalizer)
        found = scores
        if found is None:
            assert calibration is not None
            found = output_scores(new, None, calibration)
        layers = dict(new.named_modules())
        return OutputImportance({layers[name]: found[name] for name in found.keys() & layers.keys()}, normalizer)

    for step in range(1, iterative_steps + 1):
        if step > 1:
            if between_steps is not None:
                between_steps(new, step - 1)
            graph = build_graph(new, x)
        groups, unchanged = _score(new, graph, importance or choice(), ignored)
        for group in groups:
            start.setdefault(group.name, group.channels)
        cuts, too_few = _plan(groups, start, pruning_ratio * step / iterative_steps, limits)
        unchanged |= too_few | _cut(new, x, graph, cuts, tracker)
    if not tracker.kept and (fixed := [f'{name}: {why}' for name, why in unchanged.items() if why.startswith(_FIXED)]):
        raise LeanError(f'{type(model).__name__} cannot run with fewer channels anywhere: {fixed[0]}.')
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, p in new.named_parameters():
        p.requires_grad_(flags[name])
    try:
        sizes.update(new, x)
        macs_after = count_macs(new, x.shape)
    except Exception as e:  # the model's own code meets channel counts it did not expect
        raise LeanError(f'{type(model).__name__} cannot run with fewer channels, its code fixes them: '
                        f'{type(e).__name__}: {str(e).partition(chr(10))[0][:200]}. Name the layers to leave alone by '
                        'exclude.') from e
    record_resize(new, model)
    report = ChannelReport(
        params=(count_params(model), count_params(new)), macs=(macs, macs_after), touched=changed_params(model, new),
        kept=tracker.kept, kept_inputs=tracker.kept_inputs, layers=_widths(model, tracker.kept),
        unchanged=tuple(unchanged.items()))
    new.train(model.training)
    if calibration is not None:
        new = calibrate(new, model, calibration, kept=report.kept)
    return hand_over(new, report, 'Channel pruning')


@dataclass(frozen=True)
class _Limits:
    """How many channels may go, see `prune_channels`."""
    global_pruning: bool
    round_to: int
    max_ratio: float


@dataclass(frozen=True)
class _Scored:
    """Channels that can only leave together.

    Attributes:
        name: The layer that makes them.
        root: Torch-Pruning's dependency by which they are cut.
        parts: Into how many equal parts grouped layers divide them; each part loses the same.
        values: The importance of the channels of a part, `[channels / parts]`.
    """
    name: str
    root: Any
    parts: int
    values: torch.Tensor

    @property
    def channels(self) -> int:
        return len(self.values) * self.parts


_Cut = tuple[_Scored, list[int]]
_Reasons = dict[str, str]


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


def _check_model(model: nn.Module, x: Any) -> None:
    if not isinstance(x, torch.Tensor) or x.ndim != 4:
        raise LeanError('example_inputs must be an image batch [B, C, H, W] as a tensor, got '
                        f'{list(getattr(x, "shape", [])) or type(x).__name__}.')
    check_finite(find_filter_banks(model), 'Channel pruning')


def _score(
        model: nn.Module, graph: Any, importance: Callable[[Any], torch.Tensor | None], ignored: Collection[nn.Module],
) -> tuple[list[_Scored], _Reasons]:
    """The groups that may lose channels, with their importance, and why others may not."""
    names = {m: name for name, m in model.named_modules()}
    full, lost = channel_groups(graph, ignored)
    groups, unchanged = [], {names[m]: f'Torch-Pruning cannot follow its channels ({why})' for m, why in lost.items()}
    for group in full:
        root = group[0].dep
        name, parts = names.get(root.target.module, '?'), conv_groups(group)
        if not is_consistent(group):
            along = any(isinstance(dep.target.module, ALONG_CHANNELS) for dep, _ in group)
            unchanged[name] = ('ECA attention compares neighbouring channels' if along else
                               'the code pads, slices or splits its channels')
        elif len(group[0].idxs) % parts:
            unchanged[name] = f'its channels cannot be divided among {parts} groups'
        elif unknown_layer(group):
            unchanged[name] = 'a layer of a kind that Torch-Pruning does not know reads or makes its channels'
        elif (values := _importance(importance, group)) is None:
            unchanged[name] = 'nothing to score'
        elif not bool(torch.isfinite(values).all()):
            raise LeanError(f'The importance of the channels of {name!r} is not finite. A normalizer divides by zero '
                            'where all kernels are zero; choose normalizer=None.')
        else:
            groups.append(_Scored(name, root, parts, values.view(parts, -1).mean(0).cpu().double()))
    if not groups:
        reasons = '; '.join(f'{name}: {why}' for name, why in list(unchanged.items())[:3])
        shared = any(isinstance(m, SharedBasisConv2d) for m in model.modules())
        hint = (' Layers that share a basis lose the same inputs; one that cannot lose any keeps those of all. Prune '
                'channels first: prune_channels(), then share().')
        raise LeanError(f'{type(model).__name__} has no channels to prune: '
                        f'{reasons or "all groups are left out or reach the output"}.{hint if shared else ""}')
    return groups, unchanged


def _importance(importance: Callable[[Any], torch.Tensor | None], group: Any) -> torch.Tensor | None:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return importance(group)


def _plan(groups: list[_Scored], start: dict[str, int], ratio: float, limits: _Limits) -> tuple[list[_Cut], _Reasons]:
    """The channels to cut, to bring the groups down to `1 - ratio` of what they had at the start."""
    threshold = None
    if limits.global_pruning:
        ranked = torch.cat([g.values.repeat_interleave(g.parts) for g in groups]).sort().values
        gone = len(ranked) - round((1 - ratio) * sum(start[g.name] for g in groups))
        threshold = float(ranked[gone - 1]) if gone > 0 else -math.inf
    cuts, unchanged = [], {}
    for group in groups:
        each, total = len(group.values), start[group.name] // group.parts
        keep = round(total * (1 - ratio)) if threshold is None else int((group.values > threshold).sum())
        unit = limits.round_to // math.gcd(limits.round_to, group.parts)
        least = max(unit, math.ceil((1 - limits.max_ratio) * total - 1e-9))
        keep = max(round(keep / unit), math.ceil(least / unit)) * unit
        if keep >= each:
            unchanged[group.name] = (f'{group.channels} channels stay by round_to={limits.round_to} and '
                                     f'max_pruning_ratio={limits.max_ratio:g}')
            continue
        lowest = group.values.argsort(stable=True)[:each - keep]
        cuts.append((group, torch.cat([lowest + part * each for part in range(group.parts)]).sort().values.tolist()))
    return cuts, unchanged


def _cut(
        model: nn.Module, x: torch.Tensor, graph: Any, cuts: list[_Cut], tracker: ChannelTracker) -> _Reasons:
    """Take the planned channels out; returns the groups that stay whole, and why."""
    groups = [channel_group(graph, group.root.target.module, group.root.handler, indices) for group, indices in cuts]
    failing = failing_cuts(model, x, graph, groups)
    tracker.cut(graph, [group for number, group in enumerate(groups) if number not in failing])
    return {cuts[number][0].name: error if error == EMPTY else f'{_FIXED} ({error})'
            for number, error in failing.items()}


def _widths(model: nn.Module, kept: dict[str, list[int]]) -> tuple[tuple[str, int, int], ...]:
    """Output channels before and after of the layers that lost any."""
    before = {name: m.out_channels if isinstance(m, SharedBasisConv2d) else len(m.weight)
              for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, SharedBasisConv2d))}
    return tuple((name, before[name], len(kept[name])) for name in before if name in kept)
