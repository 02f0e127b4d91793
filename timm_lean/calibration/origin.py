"""Whether a network was made from the one that is given as its original."""
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn

from timm_lean.errors import LeanError

__all__ = ['check_origin']

_ALIKE = 0.2  # cosine of the live weights of two layers; of two networks trained apart it is near 0
_FEWEST = 32  # weights that say something


def check_origin(new: nn.Module, original: nn.Module, names: Sequence[str], kept: Mapping[str, Sequence[int]]) -> None:
    """Refuse an original from which the network cannot have been made.

    Compression leaves most layers as they are, or near: what is live of their weights equals the original's, and
    points the same way after training or calibration.

    Args:
        new: The compressed network.
        original: What is said to be its original.
        names: Layers of the compressed network.
        kept: Output channels that are left of the original's, by layer.

    Raises:
        LeanError: It lacks a layer, or more layers have other weights than have such that only moved.
    """
    there = dict(original.named_modules())
    foreign, moved = [], 0
    for name in names:
        if name not in there:
            raise LeanError(f'The original has no layer {name!r}: {type(original).__name__} is not the network that '
                            f'{type(new).__name__} was made from.')
        cosine = _cosine(new.get_submodule(name), there[name], kept.get(name))
        if cosine is not None and cosine < 1:
            foreign += [(name, cosine)] if cosine < _ALIKE else []
            moved += cosine >= _ALIKE
    if len(foreign) > moved:
        name, cosine = foreign[0]
        raise LeanError(f'The weights of {name!r} are not those of the original (cosine {cosine:.2f}), nor are those '
                        f'of {len(foreign) - 1} other layers: give the very network that this one was made from.')


def _cosine(layer: Any, other: Any, kept: Sequence[int] | None) -> float | None:
    """Of the live weights of two plain layers, 1 if they are equal; None where there is nothing to compare."""
    if type(layer) is not type(other) or not isinstance(layer, (nn.Conv2d, nn.Linear)):
        return None
    a, b = layer.weight.detach(), other.weight.detach().to(layer.weight.device)
    if kept is not None and len(kept) == len(a) and max(kept, default=0) < len(b):
        b = b[torch.as_tensor(kept, dtype=torch.long, device=b.device)]
    live = a != 0
    if a.shape != b.shape or int(live.sum()) < _FEWEST:
        return None
    a, b = a[live].double(), b[live].double()
    if torch.equal(a, b):
        return 1.
    return min(float(nn.functional.cosine_similarity(a, b, 0)), 1 - 1e-12)
