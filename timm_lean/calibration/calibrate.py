"""`calibrate`: the order in which layers are fitted, and the guards that keep what does not help out."""
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn as nn
from tqdm import tqdm

from timm_lean.errors import LeanError
from timm_lean.layers import SharedBasisConv2d
from timm_lean.layers.shared_basis import bn_scale_shift

from .batchnorm import reestimate
from .fleet import Fleet, Ship, fleet, survey
from .groups import BasisGroup, find_groups
from .images import Chunk, load_chunks, of_samples, pick_positions
from .layers import LinearMap, is_layer, linear_map, rows_of, unfolded
from .memory import is_out_of_memory, memory_told
from .moments import HeldOut, Moments, is_distributed
from .origin import check_origin
from .outputs import HeldOutputs
from .report import CalibrationReport, LayerFit
from .settings import Calibration
from .walk import Join, evaluation

__all__ = ['calibrate']

LOSSLESS = 1e-5  # relative error of a layer's output that is rounding
_NEAR_ZERO = 1e-3  # scale of a channel, relative to the largest, that a target is not divided by


@torch.no_grad()
def calibrate(
        model: nn.Module,
        original: nn.Module,
        batches: Calibration | Iterable[Any],
        *,
        kept: Mapping[str, Sequence[int]] | None = None,
        **options: Any,
) -> nn.Module:
    """Choose a compressed network's weights anew, so that its layers give what the original's give.

    Args:
        model: The compressed network; it is not changed.
        original: The network it was made from.
        batches: A few hundred images as batches `[B, C, H, W]`, or tuples that start with them; or a `Calibration`.
        kept: Output channels that are left of the original's, by layer; for layers that lost channels.
        **options: Options of `Calibration`: `forward`, `ridge`, `rounds`, `positions`, `biases_only`, `reestimate_bn`,
            `memory_limit`, `progress`.

    Returns:
        A new network in the mode of the given one, with `.calibration_report`.

    Raises:
        LeanError: No images or unusable ones, an original that is not the network's, lost channels without `kept`, or
            too little memory.
    """
    setting = Calibration.of(batches, **options)
    chunks = load_chunks(setting)
    new = deepcopy(model)
    with memory_told(setting.memory_limit), evaluation(original, new):
        _Fit(new, original, chunks, dict(kept or {}), setting).run()
    return new


class _Fit:
    """One calibration, in place."""

    def __init__(
            self, new: nn.Module, original: nn.Module, chunks: list[Chunk], kept: dict[str, Sequence[int]],
            setting: Calibration):
        self.new, self.original, self.chunks, self.kept, self.setting = new, original, chunks, kept, setting
        self.device = next(new.parameters()).device
        self.names = [name for name, module in new.named_modules() if is_layer(module)]
        inside = [name + '.' for name in self.names if isinstance(new.get_submodule(name), SharedBasisConv2d)]
        self.names = [name for name in self.names if not name.startswith(tuple(inside))]
        check_origin(new, original, self.names, kept)
        uses = Counter(id(p) for module in new.modules() for p in module.parameters(recurse=False))
        # one weight in two layers has no one right value; shared bases are fitted as such
        self.tied = {name for name in self.names if any(
            uses[id(p)] > 1 for p in new.get_submodule(name).parameters(recurse=False))}
        try:
            self.survey, self.survey0 = (survey(network, self.names, chunks) for network in (new, original))
            self.outputs = HeldOutputs(original, chunks, setting.memory_limit)
        except LeanError:
            raise
        except (RuntimeError, AssertionError, ValueError, TypeError) as e:
            if is_out_of_memory(e):
                raise
            what = ('calibration batches, run by forward=' if setting.forward is not None else
                    f'calibration images {str(sorted({tuple(chunk.batch.shape[1:]) for chunk in chunks}))[1:-1]}')
            raise LeanError(f'{type(new).__name__} does not take the {what}: '
                            f'{type(e).__name__}: {str(e).partition(chr(10))[0][:200]}') from e
        self.joins = self.survey.joins.keys() & self.survey0.joins.keys()
        self.norms = _by_running_mean(new), _by_running_mean(original)

    def run(self) -> None:
        report = CalibrationReport()
        report.held_out = self.outputs.images
        report.images = sum(int((~chunk.held).sum()) for chunk in self.chunks)
        report.before = report.after = self.outputs.error(self.new)
        used = [name for name in self.names if name in self.survey.counts]
        groups = [] if self.setting.biases_only else find_groups(self.new, self.original, used)
        best = _state(self.new)
        for number in range(self.setting.rounds if groups else 1):
            fits: list[LayerFit] = []
            if groups:
                fits += self._fit_groups(groups, first=number == 0)
            fits += self._fit_layers()
            error = self.outputs.error(self.new)
            if not error < report.after:
                _restore(self.new, best)
                break
            report.after, report.layers, report.rounds, best = error, fits, number + 1, _state(self.new)
        if self.setting.reestimate_bn and reestimate(self.new, self.chunks, self.setting.memory_limit):
            error = self.outputs.error(self.new)
            report.reestimated = error < report.after
            if report.reestimated:
                report.after = error
            else:
                _restore(self.new, best)
        self.new.calibration_report = report  # type: ignore[assignment]

    def _fleet(self) -> Any:
        networks = self.original, self.new
        return fleet(networks, self.names, self.chunks, self.survey, self.setting.memory_limit, self.joins)

    # front to back -------------------------------------------------------------------------------------------------

    def _fit_layers(self) -> list[LayerFit]:
        points = [(name, joined) for name, joined in self.survey.order if joined == (name in self.joins)]
        fits = []
        with self._fleet() as ships:
            bar = tqdm(points, 'calibrate', disable=not self.setting.progress, leave=False)
            for index, (name, joined) in enumerate(bar):
                fit = self._fit_layer(ships, index, name, joined)
                if fit is not None:
                    fits.append(fit)
        return fits

    def _fit_layer(self, ships: Fleet, index: int, name: str, joined: bool) -> LayerFit | None:
        """Fit one layer, with all passes standing at it."""
        norm, norm0 = (norms.get(id(survey.norms.get(name))) for norms, survey in zip(
            self.norms, (self.survey, self.survey0), strict=True))
        if norm is None or norm0 is None:
            norm = norm0 = None
        layer = linear_map(self.new.get_submodule(name), norm)
        if layer is None or name in self.tied:
            return None
        if self.setting.biases_only and not layer.free_bias():
            return None
        calls = self.survey.counts[name]
        held = HeldOut(layer.groups, layer.filters, self.device)
        train: Moments | None = None
        joins = []
        for ship in ships.at(name):
            for call in range(calls):
                inputs, lacking, targets, join = self._samples(
                    ships, ship, index, layer, name, call, joined, norm, norm0)
                joins.append(join)
                if train is None:
                    few = len(inputs) // len(ship.held) * ships.images * calls < layer.size and not is_distributed()
                    train = Moments(layer.groups, layer.filters, layer.size, few, self.device)
                chosen = of_samples(ship.held, len(inputs))
                held.add(inputs[chosen], lacking[chosen], targets[chosen])
                train.add(inputs[~chosen], lacking[~chosen])
        assert train is not None
        train.reduce(held.error, held.energy)
        before = after = float(held.error.sum())
        if before > LOSSLESS ** 2 * float(held.energy.sum()):
            change = train.solve(self.setting.ridge, layer.free, layer.bias, layer.block)
            errors = held.error_after(change)
            helps = errors < held.error  # filter by filter
            change = change * helps[..., None]
            after = float(torch.where(helps, errors, held.error).sum())
            shift = layer.shift(change) if layer.bias and norm is not None else None
            layer.assign(layer.weight + change)
            for join in joins:
                if join is not None:
                    self._go_on(join, layer, shift)
        if calls > 1:
            ships.restart()
        scale = max(float(held.energy.sum()), 1e-30)
        return LayerFit(name, 'sum' if joined else 'output', (before / scale) ** 0.5, (max(after, 0.) / scale) ** 0.5,
                        train.count)

    def _samples(
            self, ships: Fleet, ship: Ship, index: int, layer: LinearMap, name: str, call: int, joined: bool,
            norm: nn.Module | None, norm0: nn.Module | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Join | None]:
        """Inputs, what the outputs lack, what they should be, of one piece at one layer."""
        there, here = (walk.to(name, call, 'sum' if joined else where)
                       for walk, where in zip(ship.walks, ('after', 'before'), strict=True))
        if there is None or here is None:
            raise LeanError(f'The original does not run the layer {name!r} as the compressed network does: it is not '
                            'the network that it was made from.')
        rows0 = rows_of(layer.layer, there.outputs)
        chosen = self._positions(rows0.shape[1], layer.size, index, ships, ship, self.survey.counts[name])

        def sampled(y: torch.Tensor) -> torch.Tensor:
            return _at(rows_of(layer.layer, y), chosen)

        inputs = layer.inputs(here.inputs, chosen)
        outputs = layer.outputs(inputs)
        channels = self._channels(name, rows0.shape[2], outputs.shape[1])
        targets = sampled(there.outputs)[:, channels]
        if norm is not None and norm0 is not None:
            targets = _through_norms(targets, norm0, norm, channels)
        if joined:
            gap = (sampled(there.branch)[:, channels] + sampled(there.other)[:, channels]
                   - sampled(here.branch) - sampled(here.other))
            scale = torch.ones_like(gap[0]) if here.scale is None else here.scale
            usable = scale.abs() > _NEAR_ZERO * scale.abs().max()
            targets = torch.where(usable, outputs + gap / torch.where(usable, scale, 1.), targets)
        return inputs, layer.onto(targets - outputs), layer.onto(targets), here if joined else None

    def _positions(
            self, count: int, inputs: int, index: int, ships: Fleet, ship: Ship, calls: int) -> torch.Tensor | None:
        return pick_positions(count, self.setting.positions, inputs, ships.images * calls,
                              1_000_003 * index + ship.index, self.device)

    def _channels(self, name: str, there: int, here: int) -> Any:
        if name in self.kept:
            index = torch.as_tensor(self.kept[name], dtype=torch.long, device=self.device)
            if len(index) == here and (not here or int(index.max()) < there):
                return index
        elif here == there:
            return slice(None)
        raise LeanError(f'{name} has {here} of the {there} output channels of the original: calibrate() needs to know '
                        f'which; give kept={{{name!r}: [...]}}, as the techniques do with calibration=.')

    def _go_on(self, join: Join, layer: LinearMap, shift: torch.Tensor | None) -> None:
        """Put the new output of a layer where its pass waits to add the old one."""
        assert join.branch is not None
        outputs = layer.layer(join.inputs)
        if shift is not None:
            outputs = outputs + shift.to(outputs.dtype).view(-1, *[1] * (outputs.ndim - 2))
        join.branch.copy_(join.through(outputs))

    # shared bases --------------------------------------------------------------------------------------------------

    def _fit_groups(self, groups: list[BasisGroup], first: bool) -> list[LayerFit]:
        """Fit all shared bases from one pass; the first time on the original's inputs."""
        group_of = {name: group for group in groups for name in group.names}
        left = {name: self.survey.counts.get(name, 0) for name in group_of}
        fits = []
        with self._fleet() as ships:
            for index, (name, call) in enumerate(self.survey.calls):
                if name not in group_of:
                    continue
                group = group_of[name]
                for ship in ships.at(name, call):
                    there = ship.walks[0].to(name, call, 'after')
                    here = there if first else ship.walks[1].to(name, call)
                    layer, rows = group.layers[name], rows_of(group.layers[name], there.outputs)
                    chosen = self._positions(
                        rows.shape[1], group.size, index, ships, ship, self.survey.counts[name])
                    inputs = unfolded(layer, here.inputs, chosen)[:, 0]
                    held = of_samples(ship.held, len(inputs))
                    group.add(name, inputs, _at(rows, chosen), held)
                left[name] -= 1
                if not any(left[other] for other in group.names):
                    fits.append(group.fit(self.setting.ridge, first))
        return fits


def _at(rows: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Samples `[n, channels]` of `[B, positions, channels]`."""
    return (rows if positions is None else rows[:, positions]).flatten(0, 1)


def _through_norms(y: torch.Tensor, norm0: nn.Module, norm: nn.Module, channels: Any) -> torch.Tensor:
    """Outputs `[n, C]` that give behind our batch norm what the original's give behind its own."""
    (scale0, shift0), (scale, shift) = bn_scale_shift(norm0), bn_scale_shift(norm)
    usable = scale.abs() > _NEAR_ZERO * scale.abs().max()
    factor = torch.where(usable, scale0[channels] / torch.where(usable, scale, 1.), 1.)
    term = torch.where(usable, (shift0[channels] - shift) / torch.where(usable, scale, 1.), 0.)
    return y * factor.to(y.dtype) + term.to(y.dtype)


def _by_running_mean(model: nn.Module) -> dict[int, nn.Module]:
    """Batch norms that may be changed, by the identity of their running mean."""
    return {id(m.running_mean): m for m in model.modules()
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
            and all(p.requires_grad for p in m.parameters())}


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _restore(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    model.load_state_dict(state)
