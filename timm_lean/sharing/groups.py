"""Which convolutions of a network can share a basis, and the spectrum of their stacked filters."""
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from timm_lean.checkpoint.recipe import has_step
from timm_lean.errors import LeanError
from timm_lean.layers.patterns import Patterns, match_names

__all__ = ['Group', 'find_groups']


@dataclass
class Group:
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

    def cost(self, rank: int, wanted: int, bn: bool = False) -> int:
        """Weights of basis, unique filters, coefficients and the batch norms between."""
        layers, unique = len(self.names), self.unique(rank, wanted)
        return rank * self.dim + layers * (unique * self.dim + (self.out_channels + 2 * bn) * (rank + unique))


def find_groups(
        model: nn.Module, dual: bool, stages: Sequence[int] | None, include: Patterns, exclude: Patterns,
) -> list[Group]:
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    stage_of = _stage_index(model)
    convs = {n: m for n, m in model.named_modules() if _is_shareable(m)}
    wanted, unwanted = (match_names(patterns, list(convs), 'share', option, 'convolution that could share')
                        for option, patterns in (('include', include), ('exclude', exclude)))
    found: dict[tuple, list[str]] = defaultdict(list)
    for name, conv in convs.items():
        stage = stage_of(name)
        if (places[id(conv)] > 1 or uses[id(conv.weight)] > 1 or (stages is not None and stage not in stages)
                or (include is not None and name not in wanted) or name in unwanted):
            continue
        leaf = name.rpartition('.')[2] if dual else ''
        found[stage, conv.in_channels, conv.out_channels, conv.kernel_size[0], leaf].append(name)
    groups = []
    for (stage, in_chs, out_chs, k, leaf), names in found.items():
        if len(names) < 2:
            continue
        rows = torch.stack([convs[n].weight.detach().double().flatten(1) for n in names])
        if has_step(model, 'prune_kernels') and not all((convs[n].weight != 0).flatten(2).any(2).all() for n in names):
            raise LeanError(f'The kernels of {names[0]} and its group have been pruned, and a shared basis would fill '
                            'them in. Share first and prune the shared network: share(), then prune_kernels(). Or '
                            'leave the pruned layers alone by exclude.')
        if not rows.isfinite().all():
            raise LeanError(f'The weights of {names[0]} and its group hold values that are not finite.')
        _, singular, basis = torch.linalg.svd(rows.flatten(0, 1), full_matrices=False)
        # bases of one kind are orthogonal to each other in `basis_ortho`; those of two groups here need not be
        kind = f'{in_chs}-{out_chs}-{k}' + (f'-{leaf}' if leaf else '')
        groups.append(Group(stage, kind, names, in_chs, out_chs, k, rows, singular, basis))
    if not groups:
        chosen = stages is not None or include is not None or exclude is not None
        where = ' that stages, include and exclude leave' if chosen else ''
        raise LeanError(f'{type(model).__name__} has no two plain k x k convolutions (k > 1, not grouped) of one shape '
                        f'in one stage{where}: there is nothing to share.')
    return groups


def _is_shareable(module: nn.Module) -> bool:
    # the exact type: subclasses compute their weight or their padding at run time
    return (type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == 'zeros'
            and not isinstance(module.padding, str) and module.kernel_size[0] > 1
            and all(a == b for a, b in (module.kernel_size, module.stride, module.padding, module.dilation)))


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
