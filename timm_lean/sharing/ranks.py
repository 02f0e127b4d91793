"""Which factor each group shares, and of what rank."""
from collections.abc import Sequence

import torch

from timm_lean.errors import LeanError

from .groups import Group

__all__ = ['choose_form', 'rank_for_energy', 'rank_for_params', 'ranks_for_budget', 'reachable']

BUDGET_TOLERANCE = 0.03


def rank_for_energy(kept: torch.Tensor, energy: float) -> int:
    """The least rank that keeps a share of the energy."""
    if energy >= 1:
        return len(kept)
    return min(int((kept < energy).sum()) + 1, len(kept))


def rank_for_params(group: Group, params: float) -> int:
    """The largest rank by rows with a share of the layers' parameters, at least 1."""
    return max(min(int(params * group.dense / group.cost(1, 0, form='rows')), len(group.kept['rows'])), 1)


def choose_form(group: Group, energy: float) -> None:
    """Share the factor with fewer parameters at equal energy."""
    group.form = min(group.forms, key=lambda f: group.cost(rank_for_energy(group.kept[f], energy), 0, form=f))


def reachable(groups: Sequence[Group], before: int, unique_rank: int = 0, bn: bool = False) -> tuple[float, float]:
    """The least and the most parameters that sharing can leave, as shares of `before`."""
    saved = sum(group.dense - _least(group, _smallest_form(group, unique_rank, bn), unique_rank, bn)[1]
                for group in groups)
    return (before - saved) / before, 1.


def ranks_for_budget(
        groups: Sequence[Group], params: float, before: int, unique_rank: int, bn: bool = False,
) -> list[int | None]:
    """Ranks with which the network has a share of its parameters; None for groups that are best left as they are.

    Raises:
        LeanError: The share is out of reach.
    """
    low, high = reachable(groups, before, unique_rank, bn)
    if not low <= params <= high:
        raise LeanError(f'params={params} is out of reach: this network can have {low:.4f} to {high:.4f} of its '
                        'parameters by sharing (with this choice of stages, include, exclude, unique_rank, alone and '
                        'classifier).')
    start = [_least(group, group.form, unique_rank, bn) for group in groups]
    if before - sum(g.dense - cost for g, (_, cost) in zip(groups, start, strict=True)) > params * before:
        for group in groups:  # what is best at more ranks is not what is smallest at the least
            group.form = _smallest_form(group, unique_rank, bn)
        start = [_least(group, group.form, unique_rank, bn) for group in groups]
    ranks, costs = [rank for rank, _ in start], [cost for _, cost in start]
    spent = before - sum(group.dense for group in groups) + sum(costs)
    candidates = [(-slope, rank or group.full_rank, index, rank, cost) for index, group in enumerate(groups)
                  for slope, rank, cost in _steps(group, unique_rank, bn)]
    done = {index for index, rank in enumerate(ranks) if rank is None}
    for _, _, index, rank, cost in sorted(candidates, key=lambda c: c[:3]):
        if index in done:
            continue
        if spent + cost - costs[index] > params * before:
            if rank is not None:
                done.add(index)
            continue
        spent, costs[index], ranks[index] = spent + cost - costs[index], cost, rank
        if rank is None:
            done.add(index)
    if abs(spent / before - params) > BUDGET_TOLERANCE:
        raise LeanError(f'params={params} cannot be met: the nearest below is {spent / before:.4f}, because one more '
                        'filter of a basis costs more than 3 points.')
    return ranks


def _smallest_form(group: Group, unique_rank: int, bn: bool) -> str:
    return min(group.forms, key=lambda form: group.cost(1, unique_rank, bn, form))


def _least(group: Group, form: str, unique_rank: int, bn: bool) -> tuple[int | None, int]:
    """The cheapest that a group can be in a form: its rank (None for the layers as they are) and cost."""
    cost = group.cost(1, unique_rank, bn, form)
    return (1, cost) if cost < group.dense else (None, group.dense)


def _steps(group: Group, unique_rank: int, bn: bool) -> list[tuple[float, int | None, int]]:
    """What can be bought for a group: gain per parameter, the rank (None for the layers as they are), its cost.

    What is gained is the logarithm of the product over the layers of the energy kept (rank selection of Zhang et al.,
    https://arxiv.org/abs/1505.06798): unlike their sum, it lets no layer starve. It is concave in the rank, so the best
    is to buy by gain per parameter; the layers as they are close the curve by its tangent.
    """
    gained = (len(group.names) * group.kept[group.form].log()).tolist()
    costs = [group.cost(rank, unique_rank, bn) for rank in range(1, group.full_rank + 1)]
    paying = [i for i, cost in enumerate(costs) if cost < group.dense]
    steps: list[tuple[float, int | None, int]] = [
        ((gained[i] - gained[i - 1]) / max(costs[i] - costs[i - 1], 1), i + 1, costs[i]) for i in paying if i]
    back = min((-gained[i] / (group.dense - costs[i]) for i in paying), default=0.)
    return [*steps, (back, None, group.dense)]
