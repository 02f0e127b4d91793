"""Physical removal of what pruned kernels have left without effect.

A channel can go where nothing reads it (all kernels over it are zero), or where it is the same for every image (all
kernels that make it are zero, so that only biases and BN shifts are left). What a constant channel contributes moves
into the biases of the layers that read it. That is exact if the constant is zero, or if its readers see it everywhere,
without zero padding at the border; elsewhere the channel stays.

Which channels are constant is found by running the network on an image of NaN, under rules that know that a zero kernel
does not look at its input: whatever depends on the image comes out NaN, and what does not keeps its true value,
whichever activations, additions or concatenations it went through.
"""
import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from timm_lean.calibration import Calibration, calibrate
from timm_lean.errors import LeanError
from timm_lean.layers import SharedBasisConv2d
from timm_lean.layers.classifier import classifier_modules
from timm_lean.layers.lean_report import LeanReport, hand_over
from timm_lean.layers.precision import check_float32
from timm_lean.measure import count_macs, count_params

from .graph import build_graph, channel_group, channel_groups, is_consistent
from .resize import record_resize
from .sizes import ModelSizes
from .tracker import ChannelTracker

__all__ = ['CompactReport', 'compact']

_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class CompactReport(LeanReport):
    """What `compact` did.

    Attributes:
        removed: Channels removed, by the first layer that made them.
        constants: How many of them were constant, not zero, and moved into biases.
        left: Channels that no kernel makes but that stay, because removing them would not be exact.
        change: Largest absolute change of an output on the example inputs (rounding, where the removal is exact).
        scale: Largest absolute output before.
        kept: Of every layer that lost output channels, those of the given model that are left.
        kept_inputs: The same for input channels.
        macs: Multiply-accumulates of one input before and after.
    """
    removed: tuple[tuple[str, int], ...]
    constants: int
    left: int
    change: float
    scale: float
    kept: dict[str, list[int]]
    kept_inputs: dict[str, list[int]]
    macs: tuple[int, int]

    def lines(self) -> list[str]:
        lines = [f'{name}: {count} channels removed' for name, count in self.removed]
        lines.append(f'{sum(c for _, c in self.removed)} channels removed, {self.constants} of them constants moved '
                     f'into biases, {self.left} dead ones left in place; outputs changed by at most '
                     f'{self.change:.3g} of {self.scale:.3g}')
        lines.append(f'params {self.params[0]:,} -> {self.params[1]:,}, MACs {self.macs[0]:,} -> {self.macs[1]:,}')
        return lines


@dataclass
class _Input:
    """What is known about the input channels of a layer: whether constant, over the whole map, and the value."""
    constant: torch.Tensor
    uniform: torch.Tensor
    value: torch.Tensor


class _Taint(TorchFunctionMode):
    """Carries NaN through a network, as far as the image is really looked at; notes every layer's input by weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[int, _Input] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.conv2d, torch.conv2d):
            return self._conv(func, *args, **kwargs)
        if func is F.linear:
            return self._linear(*args, **kwargs)
        out = func(*args, **kwargs)
        if func in (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.Tensor.mul_):
            zero = (torch.as_tensor(args[0]) == 0) | (torch.as_tensor(args[1]) == 0)  # 0 times any number is 0
            out = out.masked_fill(zero, 0)
        return out

    def _note(self, weight: torch.Tensor, x: torch.Tensor, channel_dim: int) -> torch.Tensor:
        """Record an input and return which of its channels depend on the image, `[C]`."""
        rows = x.movedim(channel_dim, 0).flatten(1)
        tainted = rows.isnan().any(1)
        if not isinstance(weight, nn.Parameter):
            return tainted  # made for this call, so no module's
        value = rows[:, rows.shape[1] // 2]
        uniform = (rows == value[:, None]).all(1)
        seen = self.inputs.get(id(weight))
        new = _Input(~tainted, uniform, value)
        if seen is not None:  # a layer that is used twice must see the same twice
            same = seen.value == value
            new = _Input(seen.constant & new.constant, seen.uniform & uniform & same, value)
        self.inputs[id(weight)] = new
        return tainted

    def _conv(self, func: Any, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tainted = self._note(weight, input, 1)
        out = func(input.nan_to_num(), weight, *args, **kwargs)
        groups = kwargs.get('groups', args[4] if len(args) > 4 else 1)
        looks = (weight != 0).flatten(2).any(2).view(groups, -1, weight.shape[1])  # [groups, N / groups, C / groups]
        hit = (looks & tainted.view(groups, 1, -1)).any(2).flatten()
        return out.masked_fill(hit[:, None, None], torch.nan)

    def _linear(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        tainted = self._note(weight, input, -1)
        out = F.linear(input.nan_to_num(), weight, bias)
        return out.masked_fill(((weight != 0) & tainted).any(1), torch.nan)


def compact(
        model: nn.Module,
        example_inputs: torch.Tensor,
        *,
        calibration: Calibration | Iterable[Any] | None = None,
) -> nn.Module:
    """Remove the channels of a kernel-pruned timm model that have no effect.

    In a ResNet with zero padding shortcuts, and wherever else channels are
    padded, sliced or split, the streams those touch keep their width.

    Args:
        model: A model made by `timm.create_model`, in eval mode.
        example_inputs: An input `[B, C, H, W]` on the model's device.
        calibration: Images as for `calibrate`, which then mends what rounding left; removal is exact, so there is next
            to nothing to mend. To make up for pruned kernels, calibrate when pruning them.

    Returns:
        A new, smaller model in eval mode, with a `CompactReport` as `.lean_report`; the given one is unchanged.

    Raises:
        LeanError: The model is in training mode, cannot be traced, or mixes channels in a way that removal would change
            its outputs.
    """
    if model.training:
        raise LeanError('compact() needs the model in eval mode: batch norm makes constants only there. '
                        'Call model.eval() first.')
    check_float32(model, 'compact')
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    new = copy.deepcopy(model)
    x = example_inputs.detach()
    with torch.no_grad():
        expected = new(x)
    cost = count_params(new), count_macs(new, x.shape)
    sizes = ModelSizes.of(new, x)
    tracker = ChannelTracker(new)
    removed: Counter[str] = Counter()
    constants = 0
    while True:  # what leaves may leave other channels without a reader
        gone, moved, left = _remove_dead(new, x, tracker)
        removed.update(gone)
        constants += moved
        if not gone:
            break
    for name, p in new.named_parameters():
        p.requires_grad_(flags.get(name, True))
    sizes.update(new, x)
    with torch.no_grad():
        change = float((new(x) - expected).abs().max()) if removed else 0.0
    scale = float(expected.abs().max())
    if change > _TOLERANCE * max(scale, 1e-6):
        raise LeanError(f'{type(model).__name__} cannot be compacted: it mixes channels in a way that is not traced, '
                        f'and its outputs would change by {change:.3g} of {scale:.3g}.')
    record_resize(new, model)
    report = CompactReport(
        params=(cost[0], count_params(new)), macs=(cost[1], count_macs(new, x.shape)), removed=tuple(removed.items()),
        constants=constants, left=left, change=change, scale=scale, kept=tracker.kept, kept_inputs=tracker.kept_inputs)
    new.eval()
    if calibration is not None:
        new = calibrate(new, model, calibration, kept=report.kept)
    return hand_over(new, report, 'Compaction')


def _remove_dead(model: nn.Module, x: torch.Tensor, tracker: ChannelTracker) -> tuple[dict[str, int], int, int]:
    """Remove what can go now: channels by layer, how many of them were constants, and how many dead ones stay."""
    inputs = _constant_inputs(model, x)
    graph = build_graph(model, x)
    names = {m: name for name, m in model.named_modules()}
    constants = left = 0
    cuts = []
    for group in channel_groups(graph, classifier_modules(model))[0]:
        if not is_consistent(group):
            continue
        gone, dead = _removable(group, inputs)
        left += int((dead & ~gone).sum())
        if gone.all():
            gone[0] = False  # a layer keeps one channel
        if gone.any():
            constants += _move_constants(group, gone, inputs)
            cuts.append((group[0].dep, gone.nonzero()[:, 0].tolist()))
    tracker.cut(graph, [channel_group(graph, dep.target.module, dep.handler, indices) for dep, indices in cuts])
    removed = {names[dep.target.module]: len(indices) for dep, indices in cuts}
    return removed, constants, left


@torch.no_grad()
def _constant_inputs(model: nn.Module, x: torch.Tensor) -> dict[int, _Input]:
    mode = _Taint()
    with mode:
        model(torch.full_like(x, torch.nan))
    return mode.inputs


def _readers(group: Any) -> list[tuple[Any, list[int], list[int]]]:
    """The layers that take a group's channels as input and mix them: layer, its channels, the group's."""
    found = []
    for item in group:
        module = item.dep.target.module
        if isinstance(module, (nn.Conv2d, nn.Linear, SharedBasisConv2d)) and 'in_channels' in item.dep.handler.__name__:
            depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1
            if not depthwise:
                found.append((module, list(item.idxs), list(item.root_idxs)))
    return found


def _removable(group: Any, inputs: dict[int, _Input]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of a group's channels can go exactly, and which are dead (not read, or constant), `[channels]` each."""
    count = len(group[0].idxs)
    readers = _readers(group)
    gone = torch.full((count,), bool(readers))
    dead = gone.clone()
    for item in group:
        module = item.dep.target.module
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.ConvTranspose2d)) or (
                isinstance(module, nn.Conv2d) and 1 < module.groups < module.in_channels) or (
                isinstance(module, SharedBasisConv2d) and module.banks()[0].groups > 1):
            return torch.zeros(count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
    for module, idxs, roots in readers:
        unread = torch.stack([~(w != 0).transpose(0, 1).flatten(1).any(1) for w in _weights(module)]).all(0)
        known = _known_input(module, inputs)
        exact, constant = unread, unread
        if known is not None:
            constant = unread | known.constant
            movable = known.constant & known.uniform & ((known.value == 0) | _sees_no_border(module))
            exact = unread | movable
        where = torch.tensor(idxs)
        to = torch.tensor(roots)
        gone[to[~exact.cpu()[where]]] = False
        dead[to[~constant.cpu()[where]]] = False
    return gone, dead


def _weights(module: Any) -> list[torch.Tensor]:
    return [bank.weight for bank in module.banks()] if isinstance(module, SharedBasisConv2d) else [module.weight]


def _known_input(module: Any, inputs: dict[int, _Input]) -> _Input | None:
    if isinstance(module, SharedBasisConv2d):
        return None  # its input is shared with layers elsewhere; only channels that no filter reads leave
    return inputs.get(id(module.weight))


def _sees_no_border(module: Any) -> bool:
    return isinstance(module, nn.Linear) or module.padding in ((0, 0), 'valid', 0)


@torch.no_grad()
def _move_constants(group: Any, gone: torch.Tensor, inputs: dict[int, _Input]) -> int:
    """Add what the channels that go contribute to the biases of their readers; returns how many contribute."""
    moved: set[int] = set()
    for module, idxs, roots in _readers(group):
        known = _known_input(module, inputs)
        if known is None:
            continue
        for i, root in zip(idxs, roots, strict=True):
            kernels = module.weight[:, i]
            value = known.value[i].double()
            if not gone[root] or value == 0 or not bool(known.constant[i]) or not bool((kernels != 0).any()):
                continue
            shift = value * kernels.double().reshape(len(kernels), -1).sum(1)
            if module.bias is None:
                module.bias = nn.Parameter(torch.zeros_like(shift, dtype=module.weight.dtype))
            module.bias.copy_(module.bias.double() + shift)
            moved.add(root)
    return len(moved)
