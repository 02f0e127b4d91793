"""Kernels that are zero, and a note of how many there were, so that whoever saves a pruned model can tell a loss.

The zeros of a pruned model are its masks (`pruning.zeros`); a training that does not keep them revives some or all. The
note is an attribute of the module that was pruned or loaded. It is no part of a checkpoint: there the zeros themselves
are.
"""
import torch
import torch.nn as nn

from .shared_basis import FilterBasis

__all__ = ['forget_zeros', 'live_kernels', 'lost_zeros', 'note_zeros', 'zero_kernels']

_NOTE = 'lean_zeros'


def live_kernels(weight: torch.Tensor) -> torch.Tensor:
    """`[N, C / groups]`, True where a kernel has an entry that is not zero."""
    return (weight.detach() != 0).flatten(2).any(2)


def zero_kernels(model: nn.Module) -> int:
    """How many kernels of a model's filter banks are zero now."""
    weights = {id(m.weight): m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, FilterBasis))}
    return sum(int((~live_kernels(weight)).sum()) for weight in weights.values() if not weight.is_meta)


def note_zeros(model: nn.Module) -> None:
    """Note on a model how many of its kernels are zero now."""
    forget_zeros(model)
    if count := zero_kernels(model):
        setattr(model, _NOTE, count)


def forget_zeros(model: nn.Module) -> None:
    """Take the note away: the structure has changed, and with it what there is to count."""
    vars(model).pop(_NOTE, None)


def lost_zeros(model: nn.Module) -> float | None:
    """The share of the noted zeros that is gone, of the part that lost most; None if nothing was noted."""
    noted = [(vars(module)[_NOTE], zero_kernels(module)) for module in model.modules() if _NOTE in vars(module)]
    return max((max(before - now, 0) / before for before, now in noted), default=None)
