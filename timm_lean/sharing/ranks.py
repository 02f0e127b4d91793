"""How many shared filters each group gets."""
import torch

from timm_lean.errors import LeanError

from .groups import Group

__all__ = ['rank_for_energy', 'ranks_for_budget']

BUDGET_TOLERANCE = 0.03


def rank_for_energy(singular: torch.Tensor, energy: float) -> int:
    kept = singular.square().cumsum(0)
    if energy >= 1:
        return len(singular)
    return min(int((kept < energy * kept[-1]).sum()) + 1, len(singular))


def ranks_for_budget(groups: list[Group], params: float, before: int, unique_rank: int, bn: bool = False) -> list[int]:
    dense = sum(group.rows.numel() for group in groups)

    def total(ranks: list[int]) -> int:
        return before - dense + sum(g.cost(r, unique_rank, bn) for g, r in zip(groups, ranks, strict=True))

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
        step = group.dim + len(group.names) * (group.out_channels + 2 * bn)
        candidates += [(-float(gain) / step, index, rank) for rank, gain in enumerate(gains.tolist(), 2)]
    spent, full = total(ranks), set()
    for _, index, rank in sorted(candidates, key=lambda c: (c[0], c[2], c[1])):
        if index in full:
            continue
        extra = groups[index].cost(rank, unique_rank, bn) - groups[index].cost(rank - 1, unique_rank, bn)
        if spent + extra > params * before:
            full.add(index)
            continue
        spent += extra
        ranks[index] = rank
    if abs(spent / before - params) > BUDGET_TOLERANCE:
        raise LeanError(f'params={params} cannot be met: the nearest below is {spent / before:.4f}, because one more '
                        'filter of a basis costs more than 3 points.')
    return ranks
