"""Orthogonality of shared filter bases.

Paper: `Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks`
- https://arxiv.org/abs/2006.05066, section 3.2, equation 5.

Shared filters receive gradients from every layer that uses them; keeping the basis orthonormal keeps those gradients
from vanishing or exploding.
"""
from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.nn as nn

from timm_lean.errors import LeanError
from timm_lean.layers import FilterBasis, SharedBasisConv2d

from .base import Regularizer, register_regularizer

__all__ = ['BasisOrtho']


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
            if not isinstance(layer, SharedBasisConv2d):
                continue
            if layer.basis is not None:
                group = groups[layer.basis.kind][layer.basis.stage]
                if not any(bank is layer.basis for bank in group.shared):
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
                rows = torch.cat(unique)
                parts.append((shared @ rows.T).square().sum())
                entries += len(shared) * len(rows)
        return parts, entries


def _rows(bank: FilterBasis) -> torch.Tensor:
    return bank.weight.flatten(1).float()


def _gram_error(rows: torch.Tensor) -> torch.Tensor:
    """`||R R^T - I||_F^2` for rows `[n, d]`, through the smaller of the two Gram matrices.

    Both have the same non-zero eigenvalues, so `||R R^T - I||^2 = ||R^T R - I||^2 + n - d`.
    """
    n, d = rows.shape
    gram = rows @ rows.T if n <= d else rows.T @ rows
    error = (gram - torch.eye(len(gram), device=gram.device)).square().sum()
    return error + max(n - d, 0)
