"""Orthogonality of shared filter bases (`basis_ortho`) and of all filters of a convolution (`kernel_ortho`, `srip`).

Paper: `Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks`
- https://arxiv.org/abs/2006.05066, section 3.2, equation 5.

Shared filters receive gradients from every layer that uses them; keeping the basis orthonormal keeps those gradients
from vanishing or exploding.

Paper: `Can We Gain More from Orthogonality Regularizations in Training Deep CNNs?`, Bansal et al. 2018
- https://arxiv.org/abs/1810.09102, soft orthogonality and the spectral restricted isometry property (SRIP).

With the flattened filters of a convolution as rows of `W [M, C * kh * kw]`, `kernel_ortho` is `||W W^T - I||_F^2` and
`srip` the spectral norm of `W W^T - I`.
"""
from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.nn as nn

from timm_lean.errors import LeanError
from timm_lean.layers import FilterBasis, SharedBasisConv2d, SharedCoefficients
from timm_lean.layers.filter_banks import FilterBank
from timm_lean.layers.patterns import Patterns
from timm_lean.layers.shared_basis import ungroup

from .base import Regularizer, register_regularizer
from .filters import FilterRegularizer, total

__all__ = ['BasisOrtho', 'KernelOrtho', 'Srip']


@dataclass
class _Group:
    """The filters of one stage and kind."""
    shared: list[FilterBasis] = field(default_factory=list)
    unique: list[FilterBasis] = field(default_factory=list)


@register_regularizer
class BasisOrtho(Regularizer):
    """Squared distance of the shared bases from orthonormality.

    `sum_g ||B_g B_g^T - I||_F^2 / sum_g n_g^2`, where the rows of `B_g` are the `n_g` flattened shared filters of stage
    g (both bases if dual). Banks of different kinds (the 3 x 3 and the 1 x 1 convolutions of "Shared++") are separate
    terms, each normalized by itself, and added.

    Whole shared convolutions with more filters n than weights d per filter cannot be orthonormal; their minimum is
    `n - d` per stage before normalization.

    Args:
        weight: The paper's lambda.
        include_unique: Also between the shared filters and the unique ones of their stage, and among the unique filters
            of each convolution (the CIFAR-10 recipe); the mean over the entries involved.
    """
    name = 'basis_ortho'

    def __init__(self, weight: float = 10.0, include_unique: bool = False):
        super().__init__(weight)
        self.include_unique = include_unique

    def find(self, model: nn.Module) -> list[list[_Group]]:
        groups: dict[str, dict[int, _Group]] = defaultdict(lambda: defaultdict(_Group))
        lonely: dict[int, _Group] = defaultdict(_Group)
        for layer in model.modules():
            if not isinstance(layer, SharedBasisConv2d) or isinstance(layer.coeff, SharedCoefficients):
                continue
            if layer.basis is not None:
                group = groups[layer.basis.kind][layer.basis.stage]
                # by the filters: torch.export traces a copy in which every layer has a module of its own around them
                if not any(bank.weight is layer.basis.weight for bank in group.shared):
                    group.shared.append(layer.basis)
            else:
                group = lonely[id(layer)]
            if layer.unique is not None:
                group.unique.append(layer.unique)
        if not groups and not lonely:
            raise LeanError("Regularizer 'basis_ortho' found no shared filter basis in the model. Use a shared-basis "
                            "model (`timm-lean models shared`, `timm-lean models s16u1`) or drop the regularizer.")
        if not groups and not self.include_unique:
            raise LeanError("Regularizer 'basis_ortho' found unique filters only (shared_rank=0). "
                            'Give include_unique=True to regularize those.')
        if lonely:
            groups['unique'].update(lonely)
        return [list(stages.values()) for stages in groups.values()]

    def compute(self, layers: list[list[_Group]]) -> torch.Tensor:
        total = torch.zeros(())
        for stages in layers:
            squares, entries = [], 0
            for group in stages:
                parts, count = self._group_terms(group)
                squares += parts
                entries += count
            total = total.to(squares[0].device) + torch.stack(squares).sum() / entries
        return total

    def _group_terms(self, group: _Group) -> tuple[list[torch.Tensor], int]:
        """Sums of squared entries of `B B^T - I` for one stage, and the number of those entries."""
        parts, entries = [], 0
        shared = torch.cat([_rows(bank) for bank in group.shared]) if group.shared else None
        if shared is not None:
            parts.append(_gram_error(shared))
            entries += len(shared) ** 2
        if self.include_unique:
            unique = [_rows(bank) for bank in group.unique]
            parts += [_gram_error(rows) for rows in unique]
            entries += sum(len(rows) ** 2 for rows in unique)
            if shared is not None and unique:
                if len({bank.groups for bank in group.shared + group.unique}) > 1:  # filters of different lengths
                    shared = torch.cat([_dense_rows(bank) for bank in group.shared])
                    unique = [_dense_rows(bank) for bank in group.unique]
                rows = torch.cat(unique)
                parts.append((shared @ rows.T).square().sum())
                entries += len(shared) * len(rows)
        return parts, entries


@register_regularizer
class KernelOrtho(FilterRegularizer):
    """Soft kernel orthogonality, the sum over filter banks of `||W W^T - I||_F^2`.

    Filters of different groups are not compared. A bank with more filters M than weights d per filter cannot be
    orthonormal; its minimum is `M - d` per group.
    """
    name = 'kernel_ortho'

    def compute(self, layers: list[FilterBank]) -> torch.Tensor:
        return total([_gram_error(_group_rows(bank)) for bank in layers])


@register_regularizer
class Srip(FilterRegularizer):
    """Spectral restricted isometry, the sum over filter banks and groups of the spectral norm of `W W^T - I`.

    Of the two matrices `W W^T - I` and `W^T W - I` the smaller is taken: they share their eigenvalues but for the -1
    that the larger always has, which no training could lower and which would hide the others.

    The norm is estimated by power iteration, from below, without forming the matrix; the start vector is fixed, so
    that equal weights give equal values and training resumes exactly.

    Args:
        weight: Factor of the penalty in the loss.
        iterations: Steps of power iteration. The paper takes 2, from a random vector.
        include, exclude, skip_stem, skip_1x1: See `FilterRegularizer`.
    """
    name = 'srip'

    def __init__(
            self,
            weight: float = 1.0,
            iterations: int = 8,
            include: Patterns = None,
            exclude: Patterns = None,
            skip_stem: bool = False,
            skip_1x1: bool = False,
    ):
        super().__init__(weight, include, exclude, skip_stem, skip_1x1)
        if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 1:
            raise LeanError(f"iterations of 'srip' must be a whole number of at least 1, got {iterations!r}.")
        self.iterations = iterations

    def compute(self, layers: list[FilterBank]) -> torch.Tensor:
        return total([_isometry_error(_group_rows(bank), self.iterations).sum() for bank in layers])


def _rows(bank: FilterBasis) -> torch.Tensor:
    return bank.weight.flatten(1).float()


def _dense_rows(bank: FilterBasis) -> torch.Tensor:
    """Rows over all input channels, zero where a grouped filter does not look."""
    return ungroup(bank.weight, bank.groups, 1).flatten(1).float()


def _group_rows(bank: FilterBank) -> torch.Tensor:
    """Flattened filters by group, `[groups, M, d]`."""
    weight = bank.weight if bank.weight.dtype == torch.float64 else bank.weight.float()
    return weight.flatten(1).unflatten(0, (bank.groups, -1))


def _gram_error(rows: torch.Tensor) -> torch.Tensor:
    """`||R R^T - I||_F^2` for rows `[..., n, d]`, summed, through the smaller of the two Gram matrices.

    Both have the same non-zero eigenvalues, so `||R R^T - I||^2 = ||R^T R - I||^2 + n - d`.
    """
    n, d = rows.shape[-2:]
    gram = rows @ rows.mT if n <= d else rows.mT @ rows
    error = (gram - torch.eye(gram.shape[-1], device=gram.device)).square().sum()
    return error + rows.shape[:-2].numel() * max(n - d, 0)


def _isometry_error(rows: torch.Tensor, iterations: int) -> torch.Tensor:
    """Spectral norm of the smaller of `R R^T - I` and `R^T R - I` for rows `[groups, n, d]`: `[groups]`."""
    if rows.shape[1] > rows.shape[2]:
        rows = rows.mT

    def apply(rows: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return rows @ (rows.mT @ v) - v

    # Any vector that is not orthogonal to the leading eigenvector will do; squares in a cosine look random.
    index = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float64)
    v = index.square().cos().to(rows.dtype)[:, None].expand(len(rows), -1, 1)
    fixed = rows.detach()  # not no_grad(), which an exported graph does not keep
    for _ in range(iterations):
        v = torch.nn.functional.normalize(apply(fixed, v), dim=1)
    # At an eigenvector the derivative of |A v| by A is that of the eigenvalue, so v may be held constant; and |A v|,
    # unlike v^T A v, is right for a mixture of the eigenvectors of +s and -s too.
    return torch.linalg.vector_norm(apply(rows, v), dim=(1, 2))
