"""`share`: the network with bases in the place of its convolutions, and the values that make it the nearest to it."""
from collections.abc import Iterable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from timm_lean.calibration import Calibration, calibrate, insert_norms, output_errors
from timm_lean.checkpoint.recipe import record_step, register_step
from timm_lean.errors import LeanError
from timm_lean.layers import FilterBasis, SharedBasisConv2d, SharedBasisLinear
from timm_lean.layers.lean_report import changed_params, hand_over
from timm_lean.layers.patterns import Patterns
from timm_lean.layers.precision import check_float32
from timm_lean.measure import count_params

from .groups import Group, find_groups
from .kinds import factorized, shape_of, why_not
from .ranks import choose_form, rank_for_energy, rank_for_params, ranks_for_budget, reachable
from .report import LayerShare, ShareReport
from .spectra import output_spectra, weight_spectra

__all__ = ['share', 'shareable_range']


def share(
        model: nn.Module,
        *,
        shared_rank: int | None = None,
        energy: float | None = None,
        params: float | None = None,
        unique_rank: int = 0,
        dual: bool = False,
        stages: Sequence[int] | None = None,
        include: Patterns = None,
        exclude: Patterns = None,
        alone: bool | None = None,
        classifier: bool = False,
        example_input: torch.Tensor | None = None,
        bn: bool = False,
        calibration: Calibration | Iterable[Any] | None = None,
) -> nn.Module:
    """Convert a network's layers to factors shared by those of one shape in one stage.

    Convolutions with square kernels, 1 x 1 and grouped ones too, and linear layers are converted. Depthwise
    convolutions stay as they are. Layers of 1 x 1 share filters or what combines filters, whichever saves more; grouped
    convolutions a basis for each group. Where factors of layers that are 1 x 1, linear, grouped or without a partner
    would be no smaller, they stay. Give exactly one of `shared_rank`, `energy` and `params`.

    Args:
        model: The trained network; it is not changed.
        shared_rank: Filters of every basis (for each group of a grouped convolution), at most the rank of its layers.
        energy: Share of each group's squared norm that the shared basis keeps at least, in (0, 1].
        params: Parameters of the result as a share of the original's, in (0, 1]; met within 3 points. Ranks go where a
            parameter raises the product of the layers' energies most.
        unique_rank: Further filters of each layer alone.
        dual: One basis for the first convolutions of the blocks and another for the second: convolutions share only
            with those of the same name in their block.
        stages: Stages to convert, numbered as timm's feature levels (a ResNet's stem is 0); all if None.
        include: Shell patterns on the names of layers to convert, a list or joined by `|`; all if None.
        exclude: Patterns of those to leave alone.
        alone: Factorize layers that have no other of their shape in their stage too; with `shared_rank` only if True.
        classifier: Convert the classifier too.
        example_input: Images `[B, C, H, W]` to measure output errors on.
        bn: Put a batch norm between filters and coefficients, as the paper's networks have. It changes nothing at
            first: its weight and bias undo its statistics. In training mode that holds as far as the statistics of a
            batch are those of the calibration images.
        calibration: A few hundred images as batches `[B, C, H, W]`, or tuples that start with them: bases and all
            other layers are fitted so that the outputs stay near the original's, see `calibrate`, and `energy` goes by
            the energy of the layers' outputs; `params` by that or by the energy of the weights, whichever leaves the
            network's output nearer to the original's. Without, all this is about the weights alone.

    Returns:
        A new network of the same mode, with a `ShareReport` as `.lean_report`.

    Raises:
        LeanError: Arguments that cannot be met, a budget out of reach, or no convolutions that could share.
    """
    _check(shared_rank, energy, params, unique_rank)
    if bn and calibration is None:
        raise LeanError('bn=True needs calibration=LOADER: the batch norms get their statistics from its images.')
    check_float32(model, 'share')
    before = count_params(model)
    alone = shared_rank is None if alone is None else alone
    groups, left = find_groups(model, dual, stages, include, exclude, alone, classifier)
    if calibration is not None:
        calibration = Calibration.of(calibration).hold()
    size = _Size(shared_rank, energy, params, unique_rank, bn)
    others, others_left = [replace(group, kept={}, leading={}) for group in groups], dict(left)
    chosen = _choose(model, groups, left, size, before, calibration)
    if calibration is not None and params is not None:
        by_weights: list[tuple[Group, int]] = []
        with suppress(LeanError):  # where weights alone do not come to this size
            by_weights = _choose(model, others, others_left, size, before, None)
        same = {tuple(group.names): group for group in others}
        rivals = [(replace(same[tuple(group.names)], form=group.form), rank) for group, rank in chosen]
        if by_weights and _start_is_better(by_weights, rivals, model, size, calibration):
            chosen, left = by_weights, others_left
    plan = _plan(chosen, size)
    new = deepcopy(model)
    layers = _build(new, chosen, plan)
    if calibration is not None:
        new = calibrate(new, model, calibration)
        if bn:
            insert_norms(new, _add_norms(new, plan), calibration)
    error = None if example_input is None else _measure(model, new, example_input, layers)
    record_step(new, 'share', groups=plan)
    report = ShareReport(params=(before, count_params(new)), touched=changed_params(model, new), layers=tuple(layers),
                         output_error=error, left=left)
    return hand_over(new, report, 'Sharing')


@dataclass(frozen=True)
class _Size:
    """How small the factors should be, see `share`."""
    shared_rank: int | None
    energy: float | None
    params: float | None
    unique_rank: int
    bn: bool


def _choose(
        model: nn.Module, groups: list[Group], left: dict[str, str], size: _Size, before: int,
        images: Calibration | None,
) -> list[tuple[Group, int]]:
    """The groups to convert, of what rank each; why the layers of the others stay is added to `left`."""
    if size.energy is not None and size.energy >= 1:  # factors of full rank are no smaller than what they multiply to
        left |= {name: 'factors would be no smaller' for group in groups if group.must_pay for name in group.names}
        groups = [group for group in groups if not group.must_pay]
    if images is not None:
        output_spectra(groups, model, images)
    else:
        for group in groups:
            weight_spectra(group)
    for group in groups:
        count = len(group.kept['rows'])
        rank = rank_for_params(group, size.params) if size.params is not None else min(size.shared_rank or 1, count)
        choose_form(group, float(group.kept['rows'][rank - 1]) if size.energy is None else size.energy)
    ranks: Sequence[int | None]
    if size.params is not None:
        ranks = ranks_for_budget(groups, size.params, before, size.unique_rank, size.bn)
    elif size.energy is not None:
        ranks = [rank_for_energy(group.kept[group.form], size.energy) for group in groups]
    else:
        assert size.shared_rank is not None
        ranks = [min(size.shared_rank, group.full_rank) for group in groups]
    chosen = [(group, rank) for group, rank in zip(groups, ranks, strict=True) if rank is not None
              and not (group.must_pay and group.cost(rank, size.unique_rank, size.bn) >= group.dense)]
    if not chosen and size.params is None:
        raise LeanError(f'No factors of {type(model).__name__} would be smaller than its layers at this '
                        f'{"rank" if size.energy is None else "energy"}: ask for less.')
    converted = {name for group, _ in chosen for name in group.names}
    reason = 'factors would be no smaller' if size.params is None else 'kept whole by the budget'
    left |= {name: reason for group in groups for name in group.names if name not in converted}
    return chosen


def _plan(chosen: list[tuple[Group, int]], size: _Size) -> list[dict[str, Any]]:
    """What the recipe says of the groups."""
    return [{
        'layers': group.names, 'shared_rank': rank, 'unique_rank': group.unique(rank, size.unique_rank),
        'stage': group.stage, 'kind': group.kind, **({'bn': True} if size.bn else {}),
        **({'form': group.form} if group.form != 'rows' else {})} for group, rank in chosen]


def _build(model: nn.Module, chosen: list[tuple[Group, int]], plan: list[dict[str, Any]]) -> list[LayerShare]:
    """Replace the layers of groups, in place."""
    _restructure(model, plan)
    return [layer for index, (group, rank) in enumerate(chosen) for layer in _fill(model, group, rank, index)]


def _start_is_better(
        chosen: list[tuple[Group, int]], rivals: list[tuple[Group, int]], model: nn.Module, size: _Size,
        images: Calibration,
) -> bool:
    """Whether ranks by the energy of weights leave the network's output nearer to the original's than `rivals`.

    A layer's own outputs do not tell what they are worth further on: in a detector, where most of them are of the
    background, a few filters keep nearly all their energy. Both are built from the weights, so that the ranks alone
    make the difference.
    """
    plans = _plan(chosen, size), _plan(rivals, size)
    if plans[0] == plans[1]:
        return False
    networks = [deepcopy(model), deepcopy(model)]
    for network, ranks, plan in zip(networks, (chosen, rivals), plans, strict=True):
        _build(network, ranks, plan)
    first, second = output_errors(networks, model, images)
    return first < second


def shareable_range(model: nn.Module, *, classifier: bool = False) -> tuple[float, float]:
    """The least and the most parameters that `share` can leave of a network, as shares of what it has.

    Raises:
        LeanError: The network has no layers that could be converted.
    """
    groups, _ = find_groups(model, False, None, None, None, alone=True, classifier=classifier)
    return reachable(groups, count_params(model))


@register_step('share')
def _share_step(model: nn.Module, groups: list[dict[str, Any]]) -> nn.Module:
    """The structure that `share` recorded, newly initialized."""
    try:
        _restructure(model, groups)
        _add_norms(model, groups)
    except (AttributeError, KeyError, TypeError) as e:
        raise LeanError(f"The recipe step 'share' does not fit this network: {type(e).__name__}: {e}.") from e
    return model


def _check(shared_rank: Any, energy: Any, params: Any, unique_rank: Any) -> None:
    given = {'shared_rank': shared_rank, 'energy': energy, 'params': params}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise LeanError(f'Give exactly one of shared_rank, energy and params, got {", ".join(names) or "none"}.')
    for name, value, least in (('shared_rank', shared_rank, 1), ('unique_rank', unique_rank, 0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise LeanError(f'{name} must be a whole number of at least {least}, got {value!r}.')
    for name, value in (('energy', energy), ('params', params)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1):
            raise LeanError(f'{name} must be a share above 0 and at most 1, got {value!r}.')


def _restructure(model: nn.Module, plan: list[dict[str, Any]]) -> None:
    """Replace layers by factorized ones, values left to chance."""
    for group in plan:
        basis = coefficients = None
        rank = group['shared_rank']
        for name in group['layers']:
            layer: Any = model.get_submodule(name)
            if not isinstance(layer, (nn.Conv2d, nn.Linear)) or why_not(layer):
                raise LeanError(f"The recipe step 'share' does not fit this network: {name} is no plain convolution or "
                                'linear layer.')
            inputs, outputs, side, parts = shape_of(layer)
            dd: dict[str, Any] = {'device': layer.weight.device, 'dtype': layer.weight.dtype}
            dd.update(stage=group['stage'], kind=group['kind'])
            if group.get('form') == 'columns':
                coefficients = coefficients or FilterBasis(outputs, rank, 1, **dd)
                new = factorized(layer, None, coefficients, rank)
            else:
                basis = basis or FilterBasis(rank * parts, inputs, side, parts, **dd)
                new = factorized(layer, basis, True, group['unique_rank'] * parts)
            parent, _, leaf = name.rpartition('.')
            setattr(model.get_submodule(parent), leaf, new)


def _add_norms(model: nn.Module, plan: list[dict[str, Any]]) -> list[str]:
    """Put a new batch norm between filters and coefficients where the plan says so; returns their names."""
    names = [name for group in plan if group.get('bn') for name in group['layers']
             if not isinstance(model.get_submodule(name), SharedBasisLinear)]
    for name in names:
        layer: Any = model.get_submodule(name)
        weight = layer.coeff.weight
        layer.bn = nn.BatchNorm2d(
            layer.coeff.in_channels, device=weight.device, dtype=weight.dtype).train(layer.training)
    return [f'{name}.bn' for name in names]


@torch.no_grad()
def _fill(model: nn.Module, group: Group, rank: int, index: int) -> list[LayerShare]:
    """Write the factors of one group."""
    # orthonormal columns, `[parts, d, rank]` or `[parts, out, rank]`
    leading = torch.linalg.qr(group.leading[group.form](rank).mT)[0]
    reports = []
    for name, weight in zip(group.names, group.weights, strict=True):
        layer: Any = model.get_submodule(name)
        weight = weight.double()
        if group.form == 'columns':
            product = leading @ _fill_columns(layer, weight, leading)
        else:
            product = _fill_rows(layer, weight, leading.mT)
        lost = (weight - product).square().sum() / weight.square().sum().clamp_min(1e-30)
        unique = 0 if group.form == 'columns' else layer.unique_rank // group.parts
        reports.append(LayerShare(name, index, rank, unique, 1 - float(lost), form=group.form))
    return reports


def _fill_rows(layer: SharedBasisConv2d, weight: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Basis `[parts, rank, d]`, unique filters and coefficients; returns the weight they give."""
    assert layer.basis is not None
    layer.basis.weight.copy_(basis.reshape(layer.basis.weight.shape))
    filters = basis
    if layer.unique is not None:
        rest = weight - weight @ basis.mT @ basis
        unique = _leading_directions(rest, basis, layer.unique_rank // len(basis))
        layer.unique.weight.copy_(unique.reshape(layer.unique.weight.shape))
        filters = torch.cat([unique, basis], 1)
    mix = weight @ filters.mT
    layer.coeff.weight.copy_(mix.reshape(layer.coeff.weight.shape))  # type: ignore[operator, arg-type]
    return mix @ filters


def _fill_columns(layer: Any, weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Shared coefficients `[1, out, rank]` and the layer's filters for them, which are returned."""
    layer.coeff.bank.weight.copy_(columns.view_as(layer.coeff.bank.weight))
    filters = columns.mT @ weight
    layer.unique.weight.copy_(filters.view_as(layer.unique.weight))
    return filters


def _leading_directions(rest: torch.Tensor, basis: torch.Tensor, count: int) -> torch.Tensor:
    """The residual's `count` leading right-singular vectors, orthogonal to the basis even where it has vanished."""
    directions = torch.linalg.svd(rest, full_matrices=False)[2][:, :count]
    joint = torch.linalg.qr(torch.cat([basis, directions], 1).mT)[0].mT
    return joint[:, basis.shape[1]:]


@torch.no_grad()
def _measure(model: nn.Module, new: nn.Module, x: torch.Tensor, layers: list[LayerShare]) -> float:
    """Errors in eval mode, noted on the layers; every layer gets the input that it has in the original."""
    old, new = deepcopy(model).eval(), deepcopy(new).eval()
    for layer in layers:
        replaced = new.get_submodule(layer.name)

        def hook(_: nn.Module, args: tuple, y: torch.Tensor, layer: LayerShare = layer,
                 replaced: nn.Module = replaced) -> None:
            layer.output_error = _relative(replaced(*args), y)
        old.get_submodule(layer.name).register_forward_hook(hook)
    outputs, others = old(x), new(x)
    outputs, others = tree_leaves(outputs), tree_leaves(others)
    return max(_relative(b, a) for a, b in zip(outputs, others, strict=True))


def _relative(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y - reference).double().norm() / reference.double().norm().clamp_min(1e-30))
