"""Conversion of a trained network to shared filter bases, from its own weights.

The convolutions of one shape in one stage are stacked as rows `[layers * out, in * k * k]`. The leading right-singular
vectors are an exactly orthonormal basis and the projections on them the coefficients (Eckart-Young: no other basis of
that rank keeps more of the weights' squared norm). Unique filters are each layer's leading residual directions.
Nothing is put between basis and coefficients, so at full rank the network is the original in training mode too.

The idea of the basis: https://arxiv.org/abs/2006.05066 (Kang & Kim, NeurIPS 2021), which trains it from scratch.
"""
from collections import Counter, defaultdict
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch
import torch.nn as nn

from .errors import LeanError
from .layers.shared_basis import FilterBasis, SharedBasisConv2d
from .recipe import record_step, register_step

__all__ = ['LayerShare', 'ShareReport', 'share']

BUDGET_TOLERANCE = 0.03


@dataclass
class LayerShare:
    """One converted convolution.

    Attributes:
        name: Its name in the model.
        group: Index of its group.
        shared_rank: Filters of the basis it uses.
        unique_rank: Filters of its own.
        energy: Share of its weight's squared norm that is kept.
        output_error: `||y - y'|| / ||y||` of its output for the example input; None without one.
    """
    name: str
    group: int
    shared_rank: int
    unique_rank: int
    energy: float
    output_error: float | None = None


@dataclass
class ShareReport:
    """What `share` did.

    Attributes:
        layers: The converted convolutions.
        params_before: Parameters of the original.
        params_after: Parameters of the result, shared ones counted once.
        output_error: Relative error of the network's output in eval mode for the example input; None without one.
    """
    layers: list[LayerShare] = field(default_factory=list)
    params_before: int = 0
    params_after: int = 0
    output_error: float | None = None

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f'{"layer":{width}}  group  shared  unique  energy kept  output error']
        for la in self.layers:
            error = '-' if la.output_error is None else f'{la.output_error:.4f}'
            lines.append(f'{la.name:{width}}  {la.group:5}  {la.shared_rank:6}  {la.unique_rank:6}  '
                         f'{100 * la.energy:9.2f} %  {error:>12}')
        lines.append(f'parameters {self.params_before:,} -> {self.params_after:,} '
                     f'({100 * self.params_after / self.params_before:.1f} %)')
        if self.output_error is not None:
            lines.append(f'relative error of the output {self.output_error:.4f}')
        return '\n'.join(lines)


@dataclass
class _Group:
    """Convolutions that can share one basis, with the spectrum of their stacked filters."""
    stage: int
    kind: str
    names: list[str]
    in_channels: int
    out_channels: int
    kernel_size: int
    rows: torch.Tensor  # [layers, out, in * k * k], float64
    singular: torch.Tensor
    basis: torch.Tensor  # [full rank, in * k * k], rows orthonormal

    @property
    def full_rank(self) -> int:
        return len(self.singular)

    @property
    def dim(self) -> int:
        return self.rows.shape[2]

    def unique(self, rank: int, wanted: int) -> int:
        """Unique filters that can still find a direction beside `rank` shared ones."""
        return max(min(wanted, self.out_channels, self.dim - rank), 0)

    def cost(self, rank: int, wanted: int) -> int:
        """Weights of basis, unique filters and coefficients."""
        layers, unique = len(self.names), self.unique(rank, wanted)
        return rank * self.dim + layers * (unique * self.dim + self.out_channels * (rank + unique))


def share(
        model: nn.Module,
        shared_rank: int | None = None,
        energy: float | None = None,
        params: float | None = None,
        unique_rank: int = 0,
        dual: bool = False,
        stages: Sequence[int] | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        example_input: torch.Tensor | None = None,
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
        include: Names or `fnmatch` patterns of convolutions to convert; all if None.
        exclude: Names or patterns to leave alone.
        example_input: Images `[B, C, H, W]` to measure output errors on.

    Returns:
        A new network of the same mode, with `.share_report`.

    Raises:
        LeanError: Arguments that cannot be met, a budget out of reach, or no convolutions that could share.
    """
    _check(shared_rank, energy, params, unique_rank)
    groups = _find_groups(model, dual, stages, _patterns(include), _patterns(exclude))
    before = sum(p.numel() for p in model.parameters())
    if params is not None:
        ranks = _ranks_for_budget(groups, params, before, unique_rank)
    elif energy is not None:
        ranks = [_rank_for_energy(group.singular, energy) for group in groups]
    else:
        assert shared_rank is not None
        ranks = [min(shared_rank, group.full_rank) for group in groups]
    plan: list[dict[str, Any]] = [{
        'layers': group.names, 'shared_rank': rank, 'unique_rank': group.unique(rank, unique_rank),
        'stage': group.stage, 'kind': group.kind} for group, rank in zip(groups, ranks, strict=True)]
    new = deepcopy(model)
    _restructure(new, plan)
    report = ShareReport(params_before=before)
    for index, (group, rank) in enumerate(zip(groups, ranks, strict=True)):
        report.layers += _fill(new, group, rank, index)
    report.params_after = sum(p.numel() for p in new.parameters())
    if example_input is not None:
        _measure(model, new, example_input, report)
    record_step(new, 'share', groups=plan)
    new.share_report = report  # type: ignore[assignment]
    return new


@register_step('share')
def _share_step(model: nn.Module, groups: list[dict[str, Any]]) -> nn.Module:
    """The structure that `share` recorded, newly initialized."""
    try:
        _restructure(model, groups)
    except (AttributeError, KeyError, TypeError) as e:
        raise LeanError(f"The recipe step 'share' does not fit this network: {type(e).__name__}: {e}.") from e
    record_step(model, 'share', groups=groups)
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


def _patterns(patterns: str | Sequence[str] | None) -> list[str] | None:
    return [patterns] if isinstance(patterns, str) else None if patterns is None else list(patterns)


def _is_shareable(module: nn.Module) -> bool:
    # the exact type: subclasses compute their weight or their padding at run time
    return (type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == 'zeros'
            and not isinstance(module.padding, str) and module.kernel_size[0] > 1
            and all(a == b for a, b in (module.kernel_size, module.stride, module.padding, module.dilation)))


def _find_groups(
        model: nn.Module, dual: bool, stages: Sequence[int] | None, include: list[str] | None,
        exclude: list[str] | None,
) -> list[_Group]:
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    stage_of = _stage_index(model)
    convs = {n: m for n, m in model.named_modules() if _is_shareable(m)}
    for patterns in (include, exclude):
        for pattern in patterns or ():
            if not any(fnmatch(name, pattern) for name in convs):
                raise LeanError(f'{pattern!r} matches no convolution that could share. '
                                f'There are: {", ".join(convs)[:300] or "none"}.')
    found: dict[tuple, list[str]] = defaultdict(list)
    for name, conv in convs.items():
        stage = stage_of(name)
        if (places[id(conv)] > 1 or uses[id(conv.weight)] > 1 or (stages is not None and stage not in stages)
                or (include is not None and not any(fnmatch(name, p) for p in include))
                or any(fnmatch(name, p) for p in exclude or ())):
            continue
        leaf = name.rpartition('.')[2] if dual else ''
        found[stage, conv.in_channels, conv.out_channels, conv.kernel_size[0], leaf].append(name)
    groups = []
    for (stage, in_chs, out_chs, k, leaf), names in found.items():
        if len(names) < 2:
            continue
        rows = torch.stack([convs[n].weight.detach().double().flatten(1) for n in names])
        if not rows.isfinite().all():
            raise LeanError(f'The weights of {names[0]} and its group hold values that are not finite.')
        _, singular, basis = torch.linalg.svd(rows.flatten(0, 1), full_matrices=False)
        # bases of one kind are orthogonal to each other in `basis_ortho`; those of two groups here need not be
        kind = f'{in_chs}-{out_chs}-{k}' + (f'-{leaf}' if leaf else '')
        groups.append(_Group(stage, kind, names, in_chs, out_chs, k, rows, singular, basis))
    if not groups:
        chosen = stages is not None or include is not None or exclude is not None
        where = ' that stages, include and exclude leave' if chosen else ''
        raise LeanError(f'{type(model).__name__} has no two plain k x k convolutions (k > 1, not grouped) of one shape '
                        f'in one stage{where}: there is nothing to share.')
    return groups


def _stage_index(model: nn.Module) -> Any:
    """A function from a module's name to its stage: the first feature level whose module has not passed yet.

    timm's CNNs register their modules in the order of execution. A `features_only` network joins names by `_`.
    """
    info: Any = getattr(model, 'feature_info', None)
    levels = [i['module'] for i in (info if isinstance(info, (list, tuple)) else getattr(info, 'info', None) or [])
              if isinstance(i, dict) and i.get('module')]
    names = [name for name, _ in model.named_modules()]
    flat = [name.replace('.', '_') + '_' for name in names]
    ends = [max((i for i, n in enumerate(flat) if n.startswith(level.replace('.', '_') + '_')), default=-1)
            for level in levels]
    position = {name: i for i, name in enumerate(names)}
    return lambda name: sum(0 <= end < position[name] for end in ends)


def _rank_for_energy(singular: torch.Tensor, energy: float) -> int:
    kept = singular.square().cumsum(0)
    if energy >= 1:
        return len(singular)
    return min(int((kept < energy * kept[-1]).sum()) + 1, len(singular))


def _ranks_for_budget(groups: list[_Group], params: float, before: int, unique_rank: int) -> list[int]:
    dense = sum(group.rows.numel() for group in groups)

    def total(ranks: list[int]) -> int:
        return before - dense + sum(g.cost(r, unique_rank) for g, r in zip(groups, ranks, strict=True))

    ranks = [1] * len(groups)
    low, high = total(ranks) / before, total([group.full_rank for group in groups]) / before
    if not low <= params <= high:
        raise LeanError(f'params={params} is out of reach: this network can have {low:.4f} to {high:.4f} of its '
                        'parameters by sharing (with these stages, include, exclude and unique_rank).')
    candidates = []
    for index, group in enumerate(groups):
        # of the product over the layers of the energy kept (rank selection of Zhang et al.,
        # https://arxiv.org/abs/1505.06798): unlike their sum, it lets no layer starve
        kept = group.singular.square().cumsum(0).clamp_min(1e-30).log()
        gains = len(group.names) * kept.diff()
        step = group.dim + len(group.names) * group.out_channels
        candidates += [(-float(gain) / step, index, rank) for rank, gain in enumerate(gains.tolist(), 2)]
    spent, full = total(ranks), set()
    for _, index, rank in sorted(candidates, key=lambda c: (c[0], c[2], c[1])):
        if index in full:
            continue
        extra = groups[index].cost(rank, unique_rank) - groups[index].cost(rank - 1, unique_rank)
        if spent + extra > params * before:
            full.add(index)
            continue
        spent += extra
        ranks[index] = rank
    if abs(spent / before - params) > BUDGET_TOLERANCE:
        raise LeanError(f'params={params} cannot be met: the nearest below is {spent / before:.4f}, because one more '
                        'filter of a basis costs more than 3 points.')
    return ranks


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
                norm_layer=None, padding=int(conv.padding[0]), dilation=conv.dilation[0],
                bias=conv.bias is not None, **dd)
            if conv.bias is not None:
                layer.coeff.bias = conv.bias
            layer.train(conv.training)
            parent, _, leaf = name.rpartition('.')
            setattr(model.get_submodule(parent), leaf, layer)


@torch.no_grad()
def _fill(model: nn.Module, group: _Group, rank: int, index: int) -> list[LayerShare]:
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
def _measure(model: nn.Module, new: nn.Module, x: torch.Tensor, report: ShareReport) -> None:
    """Errors in eval mode; every layer gets the input that it has in the original."""
    old, new = deepcopy(model).eval(), deepcopy(new).eval()
    for layer in report.layers:
        replaced = new.get_submodule(layer.name)

        def hook(_: nn.Module, args: tuple, y: torch.Tensor, layer: LayerShare = layer,
                 replaced: nn.Module = replaced) -> None:
            layer.output_error = _relative(replaced(*args), y)
        old.get_submodule(layer.name).register_forward_hook(hook)
    outputs, others = old(x), new(x)
    if isinstance(outputs, torch.Tensor):
        outputs, others = [outputs], [others]
    report.output_error = max(_relative(b, a) for a, b in zip(outputs, others, strict=True))


def _relative(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y - reference).double().norm() / reference.double().norm().clamp_min(1e-30))
