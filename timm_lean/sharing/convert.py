"""`share`: the network with bases in the place of its convolutions, and the values that make it the nearest to it."""
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn as nn

from timm_lean.calibration import Calibration, calibrate, insert_norms, output_spectra
from timm_lean.checkpoint.recipe import record_step, register_step
from timm_lean.errors import LeanError
from timm_lean.layers.lean_report import changed_params, hand_over
from timm_lean.layers.patterns import Patterns
from timm_lean.layers.precision import check_float32
from timm_lean.layers.shared_basis import FilterBasis, SharedBasisConv2d
from timm_lean.measure import count_params

from .groups import Group, find_groups
from .ranks import rank_for_energy, ranks_for_budget
from .report import LayerShare, ShareReport

__all__ = ['share']


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
        example_input: torch.Tensor | None = None,
        bn: bool = False,
        calibration: Calibration | Iterable[Any] | None = None,
) -> nn.Module:
    """Convert a network's convolutions to bases shared by those of one shape in one stage.

    Plain convolutions with square kernels larger than 1 x 1 are converted, two or more at a time. Left alone are
    1 x 1, grouped and depthwise convolutions and kinds that compute their weights (weight standardization).
    Give exactly one of `shared_rank`, `energy` and `params`.

    Args:
        model: The trained network; it is not changed.
        shared_rank: Filters of every basis, at most the rank of its group.
        energy: Share of each group's squared norm that the shared basis keeps at least, in (0, 1].
        params: Parameters of the result as a share of the original's, in (0, 1]; met within 3 points. Ranks go where a
            parameter raises the product of the layers' energies most.
        unique_rank: Further filters of each layer alone.
        dual: One basis for the first convolutions of the blocks and another for the second: convolutions share only
            with those of the same name in their block.
        stages: Stages to convert, numbered as timm's feature levels (a ResNet's stem is 0); all if None.
        include: Shell patterns on the names of convolutions to convert, a list or joined by `|`; all if None.
        exclude: Patterns of those to leave alone.
        example_input: Images `[B, C, H, W]` to measure output errors on.
        bn: Put a batch norm between filters and coefficients, as the paper's networks have. It changes nothing at
            first: its weight and bias undo its statistics. In training mode that holds as far as the statistics of a
            batch are those of the calibration images.
        calibration: A few hundred images as batches `[B, C, H, W]`, or tuples that start with them: bases and all
            other layers are fitted so that the outputs stay near the original's, see `calibrate`, and `energy` and
            `params` go by the energy of the layers' outputs. Without, all this is about the weights alone.

    Returns:
        A new network of the same mode, with a `ShareReport` as `.lean_report`.

    Raises:
        LeanError: Arguments that cannot be met, a budget out of reach, or no convolutions that could share.
    """
    _check(shared_rank, energy, params, unique_rank)
    if bn and calibration is None:
        raise LeanError('bn=True needs calibration=LOADER: the batch norms get their statistics from its images.')
    check_float32(model, 'share')
    groups = find_groups(model, dual, stages, include, exclude)
    if calibration is not None:
        calibration = Calibration.of(calibration).hold()
        for group, spectrum in zip(groups, output_spectra(model, [g.names for g in groups], calibration), strict=True):
            group.singular = spectrum
    before = count_params(model)
    if params is not None:
        ranks = ranks_for_budget(groups, params, before, unique_rank, bn)
    elif energy is not None:
        ranks = [rank_for_energy(group.singular, energy) for group in groups]
    else:
        assert shared_rank is not None
        ranks = [min(shared_rank, group.full_rank) for group in groups]
    plan: list[dict[str, Any]] = [{
        'layers': group.names, 'shared_rank': rank, 'unique_rank': group.unique(rank, unique_rank),
        'stage': group.stage, 'kind': group.kind, **({'bn': True} if bn else {})}
        for group, rank in zip(groups, ranks, strict=True)]
    new = deepcopy(model)
    _restructure(new, plan)
    layers = [layer for index, (group, rank) in enumerate(zip(groups, ranks, strict=True))
              for layer in _fill(new, group, rank, index)]
    if calibration is not None:
        new = calibrate(new, model, calibration)
        if bn:
            insert_norms(new, _add_norms(new, plan), calibration)
    error = None if example_input is None else _measure(model, new, example_input, layers)
    record_step(new, 'share', groups=plan)
    report = ShareReport(params=(before, count_params(new)), touched=changed_params(model, new), layers=tuple(layers),
                         output_error=error)
    return hand_over(new, report, 'Sharing')


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
    """Replace convolutions by shared ones, values left to chance."""
    for group in plan:
        basis = None
        for name in group['layers']:
            conv = model.get_submodule(name)
            if type(conv) is not nn.Conv2d:
                raise LeanError(f"The recipe step 'share' does not fit this network: {name} is no plain convolution.")
            dd: dict[str, Any] = {'device': conv.weight.device, 'dtype': conv.weight.dtype}
            size = conv.kernel_size[0]
            if basis is None:
                basis = FilterBasis(
                    group['shared_rank'], conv.in_channels, size, stage=group['stage'], kind=group['kind'], **dd)
            layer = SharedBasisConv2d(
                conv.in_channels, conv.out_channels, size, basis, group['unique_rank'], stride=conv.stride[0],
                norm_layer=None,
                padding=int(conv.padding[0]), dilation=conv.dilation[0],
                bias=conv.bias is not None, **dd)
            if conv.bias is not None:
                layer.coeff.bias = conv.bias
            layer.train(conv.training)
            parent, _, leaf = name.rpartition('.')
            setattr(model.get_submodule(parent), leaf, layer)


def _add_norms(model: nn.Module, plan: list[dict[str, Any]]) -> list[str]:
    """Put a new batch norm between filters and coefficients where the plan says so; returns their names."""
    names = [name for group in plan if group.get('bn') for name in group['layers']]
    for name in names:
        layer: Any = model.get_submodule(name)
        mix = layer.coeff.weight
        layer.bn = nn.BatchNorm2d(mix.shape[1], device=mix.device, dtype=mix.dtype).train(layer.training)
    return [f'{name}.bn' for name in names]


@torch.no_grad()
def _fill(model: nn.Module, group: Group, rank: int, index: int) -> list[LayerShare]:
    """Write basis, unique filters and coefficients of one group."""
    basis = group.basis[:rank]
    reports = []
    for name, rows in zip(group.names, group.rows, strict=True):
        layer: Any = model.get_submodule(name)
        layer.basis.weight.copy_(basis.view_as(layer.basis.weight))
        rest = rows - rows @ basis.T @ basis
        filters = basis
        if layer.unique is not None:
            unique = _leading_directions(rest, basis, layer.unique_rank)
            layer.unique.weight.copy_(unique.view_as(layer.unique.weight))
            filters = torch.cat([unique, basis])
        mix = rows @ filters.T
        layer.coeff.weight.copy_(mix[:, :, None, None])
        lost = (rows - mix @ filters).square().sum() / rows.square().sum().clamp_min(1e-30)
        reports.append(LayerShare(name, index, rank, layer.unique_rank, 1 - float(lost)))
    return reports


def _leading_directions(rest: torch.Tensor, basis: torch.Tensor, count: int) -> torch.Tensor:
    """The residual's `count` leading right-singular vectors, orthogonal to the basis even where it has vanished."""
    directions = torch.linalg.svd(rest, full_matrices=False)[2][:count]
    joint = torch.linalg.qr(torch.cat([basis, directions]).T)[0].T
    return joint[len(basis):]


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
    if isinstance(outputs, torch.Tensor):
        outputs, others = [outputs], [others]
    return max(_relative(b, a) for a, b in zip(outputs, others, strict=True))


def _relative(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y - reference).double().norm() / reference.double().norm().clamp_min(1e-30))
