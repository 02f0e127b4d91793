"""Removing residual blocks: the technique that buys latency.

A residual block `x + F(x)` can go where its input is its shortcut and its output has the input's shape; the network
then passes the input on. https://arxiv.org/abs/2106.14190 holds that beyond some depth blocks do little else. Blocks
are ranked by what their removal does to the network's output, one by one, and after each the layers that are left are
calibrated.
"""
import copy
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from timm.models import get_model_input_config
from timm.utils import unwrap_model
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from timm_lean.calibration import Calibration, calibrate
from timm_lean.calibration.memory import memory_told
from timm_lean.calibration.moments import all_reduce
from timm_lean.checkpoint.recipe import record_step, register_step
from timm_lean.errors import LeanError
from timm_lean.layers.lean_report import LeanReport, hand_over
from timm_lean.layers.patterns import Patterns, match_names, some_names
from timm_lean.layers.precision import check_float32
from timm_lean.measure.counts import count_macs, count_params
from timm_lean.measure.latency import measure_latency

__all__ = ['BlockReport', 'find_blocks', 'rank_blocks', 'remove_blocks']

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
        calibration: Calibration | Iterable[Any] | None = None,
        example_input: torch.Tensor | None = None,
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
        example_input: An image `[1, C, H, W]` to run the network with where there are no images; of the size that timm
            says if None.

    Returns:
        A new network in the mode of the given one, with a `BlockReport` as `.lean_report`.

    Raises:
        LeanError: Contradicting arguments, blocks that cannot go, or more than there are.
    """
    given = {k: v for k, v in dict(count=count, blocks=blocks, ratio=ratio).items() if v is not None}
    if len(given) != 1:
        raise LeanError(f'Block removal needs exactly one of count, blocks and ratio, got {given or "none"}.')
    if blocks is None and calibration is None:
        raise LeanError(f'Block removal by {next(iter(given))} needs calibration=LOADER: blocks are ranked by what '
                        'their removal does to images. Or name them: blocks=[...].')
    model = unwrap_model(model)
    check_float32(model, 'remove_blocks')
    setting = None if calibration is None else Calibration.of(calibration).hold()
    if setting is not None and setting.forward is not None:
        raise LeanError('Block removal runs networks on images alone, without forward=: give the backbone by itself.')
    if setting is not None:
        images = _some_images(model, setting.batches)
    else:
        images = _example(model) if example_input is None else example_input
    names = _choose_from(model, images[:1], include, exclude)
    order = None if blocks is None else _check_names(model, blocks, names)
    amount = _amount(model, len(names), count if order is None else len(order), ratio)
    new = copy.deepcopy(model)
    removed: list[tuple[str, float | None, float | None]] = []
    for number in range(amount):
        if setting is None:
            assert order is not None
            removed.append((order[number], None, None))
        else:
            gone = {name for name, *_ in removed}
            choice = [name for name in names if name not in gone] if order is None else [order[number]]
            removed.append(min(_effects(new, model, choice, images), key=lambda effect: effect[1]))
        _remove(new, [removed[-1][0]])
        if setting is not None:
            new = calibrate(new, model, setting)
    record_step(new, STEP, blocks=[name for name, *_ in removed])
    shape = images[:1].shape
    before, after = measure_latency([copy.deepcopy(model), copy.deepcopy(new)], [shape, shape], images.device)
    report = BlockReport(
        params=(count_params(model), count_params(new)), macs=(count_macs(model, shape), count_macs(new, shape)),
        removed=tuple(removed), latency_ms=(1000 * before.median, 1000 * after.median))
    return hand_over(new, report, 'Block removal')


def find_blocks(model: nn.Module, x: torch.Tensor) -> list[str]:
    """Names of the residual blocks whose shortcut is their input itself, in the order of the network.

    Args:
        model: Any network.
        x: An image `[1, C, H, W]` on its device.
    """
    mode = _Shortcuts()
    handles = []
    for name, module in model.named_modules():
        if name and any(True for _ in module.children()):
            handles += [module.register_forward_pre_hook(mode.enter(name)), module.register_forward_hook(mode.leave)]
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), mode:
            model(x)
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training:
            module.training = flag
    return mode.found


def rank_blocks(model: nn.Module, images: torch.Tensor) -> list[str]:
    """Names of the blocks that could go, those first whose removal alone changes the network's output least.

    Args:
        model: Any network.
        images: `[N, C, H, W]` on its device.

    Raises:
        LeanError: There are none.
    """
    names = _choose_from(model, images[:1], None, None)
    return [name for name, *_ in sorted(_effects(model, model, names, images), key=lambda effect: effect[1])]


class _Shortcuts(TorchFunctionMode):
    """Notes the innermost modules that add their own input to something and return its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside: list[list[Any]] = []  # name, input, whether the input was added

    def enter(self, name: str) -> Any:
        return lambda module, args: self._inside.append([name, args[0] if args else None, False])

    def leave(self, module: nn.Module, args: Any, out: Any) -> None:
        name, x, added = self._inside.pop()
        if added and isinstance(out, torch.Tensor) and out.shape == x.shape and name not in self.found:
            self.found.append(name)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, '__name__', '') in _ADDITIONS and len(args) == 2:
            for block in reversed(self._inside):
                if any(arg is block[1] for arg in args):
                    block[2] = True
                    break
        return func(*args, **(kwargs or {}))


@register_step(STEP)
def _remove(model: nn.Module, blocks: list[str]) -> nn.Module:
    """Put the identity in the place of blocks."""
    modules = dict(model.named_modules())
    for name in blocks:
        if name not in modules or not name or isinstance(modules[name], nn.Identity):
            raise LeanError(f'The step {STEP!r} removes {str(name)[:100]!r}, and {type(model).__name__} has no such '
                            'block.')
        parent, _, leaf = name.rpartition('.')
        alone = len(inspect.signature(modules[name].forward).parameters) == 1
        setattr(model.get_submodule(parent), leaf, nn.Identity() if alone else _First())
    return model


class _First(nn.Identity):
    """In the place of blocks that are given more than their input, such as DLA's; TorchScript takes only Identity."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return x


def _choose_from(model: nn.Module, x: torch.Tensor, include: Patterns, exclude: Patterns) -> list[str]:
    names = find_blocks(model, x)
    if not names:
        raise LeanError(f'{type(model).__name__} has no residual block whose input and output have one shape: no block '
                        'can be removed.')
    what = 'Block removal', 'removable block'
    wanted = match_names(include, names, what[0], 'include', what[1]) if include is not None else set(names)
    unwanted = match_names(exclude, names, what[0], 'exclude', what[1])
    return [name for name in names if name in wanted and name not in unwanted]


def _check_names(model: nn.Module, blocks: Sequence[str], names: list[str]) -> list[str]:
    for name in blocks:
        if name not in names:
            raise LeanError(f'{type(model).__name__} has no removable block {name!r}. There are: '
                            f'{some_names(names) or "none"}.')
    if len(set(blocks)) < len(blocks):
        raise LeanError(f'blocks names one twice: {", ".join(blocks)}.')
    return list(blocks)


def _amount(model: nn.Module, there: int, count: int | None, ratio: float | None) -> int:
    if ratio is not None:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1:
            raise LeanError(f'ratio must be a share of the blocks above 0 and at most 1, got {ratio!r}.')
        count = max(round(ratio * there), 1)
    if type(count) is not int or count < 1:
        raise LeanError(f'Block removal needs at least one block to remove, got {count!r}.')
    if count > there:
        raise LeanError(f'{type(model).__name__} has {there} blocks that could go, got {count} to remove.')
    return count


def _example(model: nn.Module) -> torch.Tensor:
    return torch.zeros(1, *get_model_input_config(model)['input_size'], device=next(model.parameters()).device)


def _some_images(model: nn.Module, batches: Iterable[Any]) -> torch.Tensor:
    """The first calibration images, `[N, C, H, W]`, as many as a ranking needs."""
    images: list[torch.Tensor] = []
    for batch in batches:
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, torch.Tensor) or x.ndim != 4:
            raise LeanError('Block removal needs batches of images [B, C, H, W], or tuples that start with them, got '
                            f'{type(x).__name__}.')
        images.append(x)
        if sum(len(x) for x in images) >= _RANKING_IMAGES or images[0].shape[1:] != x.shape[1:]:
            break
    if not images:
        raise LeanError('Block removal got no calibration images.')
    same = [x for x in images if x.shape[1:] == images[0].shape[1:]]
    return torch.cat(same)[:_RANKING_IMAGES].to(next(model.parameters()).device)


@torch.no_grad()
def _effects(
        new: nn.Module, original: nn.Module, names: list[str], images: torch.Tensor,
) -> list[tuple[str, float, float]]:
    """Each block's name, the relative error of the output without it, and how much it changes its input."""
    # of each block: the squares of the error and of the output, of the change and of the input
    sums = torch.zeros(len(names), 4, dtype=torch.float64, device=images.device)

    def measure(index: int) -> Any:
        def hook(module: nn.Module, args: Any, out: torch.Tensor) -> None:
            sums[index, 2:] += torch.stack([squares(out - args[0]), squares(args[0])])
        return hook

    def squares(x: torch.Tensor) -> torch.Tensor:
        return x.double().square().sum()

    def outputs(network: nn.Module) -> torch.Tensor:
        with memory_told(work=f'Ranking blocks by {len(images)} images {list(images.shape[1:])}'):
            return torch.cat([tensor.flatten() for tensor in tree_leaves(network(images))])

    truth = outputs(copy.deepcopy(original).eval())
    trial = copy.deepcopy(new).eval()
    handles = [trial.get_submodule(name).register_forward_hook(measure(index)) for index, name in enumerate(names)]
    outputs(trial)
    for handle in handles:
        handle.remove()
    for index, name in enumerate(names):
        block = trial.get_submodule(name)
        _remove(trial, [name])
        sums[index, :2] += torch.stack([squares(outputs(trial) - truth), squares(truth)])
        parent, _, leaf = name.rpartition('.')
        setattr(trial.get_submodule(parent), leaf, block)
    all_reduce([sums])  # every process removes the same blocks
    errors, changes = (sums[:, [0, 2]] / sums[:, [1, 3]].clamp_min(1e-60)).sqrt().T.tolist()
    return list(zip(names, errors, changes, strict=True))
