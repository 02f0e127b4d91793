"""What images excite in a network: second moments of its layers' inputs, and what follows from them.

By how much a layer's output error grows if a kernel `w` (one output, one input channel) goes is `w^T H_cc w`, `H_cc`
the kernel's block of the covariance of what the filter sees. Layers differ in the energy of their outputs and in the
number of their kernels, so each kernel is compared with the mean of its layer.
"""
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn as nn

from timm_lean.errors import LeanError

from .fleet import fleet, survey
from .images import load_chunks, pick_positions
from .layers import is_layer, rows_of, unfolded
from .memory import memory_told
from .moments import all_reduce
from .settings import Calibration
from .walk import evaluation

__all__ = ['group_covariances', 'input_covariances', 'output_scores']


@torch.no_grad()
def input_covariances(
        model: nn.Module,
        names: Sequence[str],
        calibration: Calibration | Iterable[Any],
        **options: Any,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Covariances of what the filters of convolutions and linear layers see, over all images and calls.

    Args:
        model: The network.
        names: Its layers.
        calibration: Images, see `Calibration`; `ridge` is added to the diagonal, relative to its mean.
        **options: Options of `Calibration`.

    Yields:
        Name and covariance `[groups, d, d]` in float64, as soon as a layer has been called for the last time.
    """
    setting = Calibration.of(calibration, **options)
    chunks = load_chunks(setting)
    device = next(model.parameters()).device
    with memory_told(setting.memory_limit), evaluation(model):
        met = survey(model, names, chunks)
        left = dict(met.counts)
        sums: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        with fleet([model], names, chunks, met, setting.memory_limit) as ships:
            for index, (name, call) in enumerate(met.calls):
                layer: Any = model.get_submodule(name)
                for ship in ships.at(name, call):
                    looks = ships.images * met.counts[name]
                    stop = ship.walks[0].to(name, call, 'after')
                    count = rows_of(layer, stop.outputs).shape[1]
                    chosen = pick_positions(count, setting.positions, layer.weight[0].numel(), looks,
                                            1_000_003 * index + ship.index, device)
                    x = unfolded(layer, stop.inputs, chosen).transpose(0, 1)
                    gram, total, number = (x.mT @ x).double(), x.double().sum(1), x.new_tensor(x.shape[1]).double()
                    before = sums.get(name)
                    sums[name] = (gram, total, number) if before is None else (
                        before[0] + gram, before[1] + total, before[2] + number)
                left[name] -= 1
                if not left[name]:
                    all_reduce(list(sums[name]))
                    yield name, _covariance(*sums.pop(name), setting.ridge)


@torch.no_grad()
def output_scores(
        model: nn.Module, names: Sequence[str] | None, calibration: Calibration | Iterable[Any], **options: Any,
) -> dict[str, torch.Tensor]:
    """By how much a layer's output error grows if a kernel goes, relative to the mean of the layer's kernels.

    Args:
        model: The network.
        names: Its convolutions and linear layers; None for all that can be scored.
        calibration: Images, see `Calibration`.
        **options: Options of `Calibration`.

    Returns:
        Scores `[N, C / groups]` in float64 by name, of those layers that the network runs.

    Raises:
        LeanError: A layer that is no plain convolution, or images as `load_chunks` refuses them.
    """
    plain = {name: isinstance(m, (nn.Conv2d, nn.Linear)) and is_layer(m) for name, m in model.named_modules()}
    for name in names or ():
        if not plain[name]:
            layer = model.get_submodule(name)
            raise LeanError(f"The criterion 'output' scores plain convolutions, and {name!r} is a "
                            f'{type(layer).__name__}. Prune before sharing, or leave it out by exclude.')
    chosen = [name for name in plain if plain[name]] if names is None else names
    return {name: _scores(model.get_submodule(name), covariance)
            for name, covariance in input_covariances(model, chosen, calibration, **options)}


def group_covariances(
        model: nn.Module, groups: Sequence[Sequence[str]], calibration: Calibration | Iterable[Any], **options: Any,
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Covariances of what the layers of groups see, group by group.

    Args:
        model: The network.
        groups: Names of convolutions or linear layers.
        calibration: Images, see `Calibration`.
        **options: Options of `Calibration`.

    Yields:
        Index of a group and the covariances `[groups, d, d]` of its layers, as soon as all are known.

    Raises:
        LeanError: The network does not run one of the layers.
    """
    group_of = {name: index for index, names in enumerate(groups) for name in names}
    waiting: dict[int, dict[str, torch.Tensor]] = {index: {} for index in range(len(groups))}
    for name, covariance in input_covariances(model, list(group_of), calibration, **options):
        index = group_of[name]
        waiting[index][name] = covariance
        if len(waiting[index]) == len(groups[index]):
            found = waiting.pop(index)
            yield index, [found[n] for n in groups[index]]
    if waiting:
        missing = next(name for index in waiting for name in groups[index] if name not in waiting[index])
        raise LeanError(f'The network never runs {missing!r}, so images say nothing about it; leave it out by exclude.')


def _scores(layer: Any, covariance: torch.Tensor) -> torch.Tensor:
    channels, size = layer.weight.shape[1], layer.weight[0, 0].numel()
    weight = layer.weight.detach().double().reshape(len(covariance), -1, channels, size)  # [groups, N, C, k]
    blocks = covariance.unflatten(2, (channels, size)).unflatten(1, (channels, size))
    blocks = blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # [groups, C, k, k]
    increase = torch.einsum('gnck,gckl,gncl->gnc', weight, blocks, weight)
    return (increase / increase.mean().clamp_min(1e-30)).flatten(0, 1)


def _covariance(gram: torch.Tensor, total: torch.Tensor, count: torch.Tensor, ridge: float) -> torch.Tensor:
    covariance = (gram - total[:, :, None] * total[:, None] / count) / count
    diagonal = covariance.diagonal(dim1=1, dim2=2)
    penalty = (ridge * diagonal.mean(1, keepdim=True)).clamp_min(1e-30).expand_as(diagonal)
    return covariance + torch.diag_embed(penalty)
