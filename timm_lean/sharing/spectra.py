"""How much energy the leading factors of a group keep: of its weights, or of its layers' outputs.

By rows the layers' weights are stacked below each other, by columns beside each other; the leading singular vectors of
the stack are the best shared factor (Eckart-Young). Images change what counts: with `S_l` the covariance of what layer
l sees, `W_l S_l^(1/2)` takes the place of `W_l`, divided by its norm. By columns that is exact, by rows as far as the
covariances agree (their mean whitens the stack); `calibrate` goes on from there.
"""
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn

from timm_lean.calibration import LARGEST, Calibration, group_covariances, whitened

from .groups import Group

__all__ = ['output_spectra', 'weight_spectra']

_LARGE = 2 ** 24  # weights of a group that are multiplied in single precision


def weight_spectra(group: Group) -> None:
    """Set a group's `kept` and `leading` by its weights."""
    # a layer alone may be large (VGG's first linear layer holds 103 million weights)
    large = sum(weight.numel() for weight in group.weights) > _LARGE
    weights = [weight.float() if large else weight.double() for weight in group.weights]
    _set(group, 'rows', torch.cat(weights, 1))
    if 'columns' in group.forms:
        _set_columns(group, sum((w @ w.mT for w in weights), torch.zeros(())))


@torch.no_grad()
def output_spectra(
        groups: Sequence[Group], model: nn.Module, calibration: Calibration | Iterable[Any], **options: Any) -> None:
    """Set `kept` and `leading` of groups by the energy of their layers' outputs.

    Filters with so many inputs that their covariance would be out of proportion are judged by their weights.

    Args:
        groups: The groups.
        model: The network.
        calibration: Images, see `Calibration`.
        **options: Options of `Calibration`.

    Raises:
        LeanError: The network does not run a layer, or images as `calibration.load_chunks` refuses them.
    """
    small = [group for group in groups if group.dim <= LARGEST]
    for group in groups:
        if group.dim > LARGEST:
            weight_spectra(group)
    for index, grams in group_covariances(model, [group.names for group in small], calibration, **options):
        group = small[index]
        weights = [weight.double() for weight in group.weights]
        stacks, lowers = zip(*(whitened([gram[part] for gram in grams], [weight[part] for weight in weights])
                               for part in range(group.parts)), strict=True)
        _set(group, 'rows', torch.stack(stacks), torch.stack(lowers))
        if 'columns' in group.forms:
            squares = [w @ gram @ w.mT for w, gram in zip(weights, grams, strict=True)]
            _set_columns(group, sum((s / s.diagonal(dim1=1, dim2=2).sum().clamp_min(1e-30) for s in squares),
                                    torch.zeros(())))


def _set(group: Group, form: str, stack: torch.Tensor, lower: torch.Tensor | None = None) -> None:
    """The leading right-singular vectors of `[parts, rows, d]`, found on the smaller side; `lower` is taken back."""
    wide = stack.shape[1] < stack.shape[2]
    energies, vectors = torch.linalg.eigh((stack @ stack.mT if wide else stack.mT @ stack).double())
    vectors = vectors.flip(2).mT

    def leading(rank: int) -> torch.Tensor:
        found = (vectors[:, :rank].to(stack.dtype) @ stack).double() if wide else vectors[:, :rank]
        return found if lower is None else torch.linalg.solve_triangular(lower, found, upper=False, left=False)

    group.kept[form], group.leading[form] = _kept(energies)[:min(stack.shape[1:])], leading


def _set_columns(group: Group, square: torch.Tensor) -> None:
    """The leading left-singular vectors, from the sum of the products with the transposed."""
    energies, vectors = torch.linalg.eigh(square.double())
    full = min(group.out, len(group.names) * group.dim)
    group.kept['columns'] = _kept(energies)[:full]
    group.leading['columns'] = lambda rank: vectors.flip(2).mT[:, :rank]


def _kept(energies: torch.Tensor) -> torch.Tensor:
    kept = energies.flip(1).clamp_min(0).sum(0).cumsum(0)
    return (kept / kept[-1].clamp_min(1e-300)).clamp(1e-30, 1)
