"""Taking groups of channels out of a network, and which channels are left."""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn as nn

__all__ = ['ChannelTracker', 'Part', 'take_out', 'together']


@dataclass(frozen=True)
class Part:
    """What one layer or parameter loses.

    Attributes:
        name: Its name in the network.
        handler: Torch-Pruning's function that removes channels of it.
        dim: The dimension, of a parameter.
        count: How many channels it has.
        indices: Those that leave, sorted.
    """
    name: str
    handler: Any
    dim: int
    count: int
    indices: list[int]

    @property
    def is_output(self) -> bool:
        return 'out_channels' in self.handler.__name__


def together(graph: Any, cuts: Iterable[Any]) -> list[Part]:
    """Several groups of channels as one cut.

    Layers behind a concatenation belong to several groups; all numbers are those before anything is removed.
    """
    names = {module: name for name, module in graph.model.named_modules()}
    found: dict[Any, tuple[Any, set[int]]] = {}
    for cut in cuts:
        for dep, idxs in cut:
            found.setdefault((id(dep.target), dep.handler), (dep, set()))[1].update(idxs)
    parts = []
    for dep, gone in found.values():
        target = dep.target.module
        name = graph._param_to_name.get(target) if isinstance(target, nn.Parameter) else names.get(target)
        if name is None:
            continue  # an operation
        is_output = graph.is_out_channel_pruning_fn(dep.handler)
        count = graph.get_out_channels(target) if is_output else graph.get_in_channels(target)
        if count is not None:
            parts.append(Part(name, dep.handler, dep.target.pruning_dim, count, sorted(gone)))
    return parts


def take_out(model: nn.Module, parts: Sequence[Part]) -> None:
    """Remove channels of a network or of a copy of it, in place."""
    modules = dict(model.named_modules())
    for part in parts:
        part.handler.__self__.pruning_dim = part.dim
        if part.name in modules:
            part.handler(modules[part.name], part.indices)
        else:
            owner, _, leaf = part.name.rpartition('.')
            setattr(modules[owner], leaf, part.handler(getattr(modules[owner], leaf), part.indices))


class ChannelTracker:
    """Cuts groups of channels of a model.

    Attributes:
        kept: Of every module that lost output channels, the first numbers of those it still has.
        kept_inputs: The same of input channels, for layers that mix them.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._names = dict(model.named_modules()).keys()
        self.kept: dict[str, list[int]] = {}
        self.kept_inputs: dict[str, list[int]] = {}

    def cut(self, graph: Any, groups: Iterable[Any]) -> None:
        """Remove the channels of groups, all at once; the graph is the model's before."""
        parts = together(graph, groups)
        for part in parts:
            if part.name in self._names:
                kept, gone = self.kept if part.is_output else self.kept_inputs, set(part.indices)
                kept[part.name] = [
                    c for i, c in enumerate(kept.get(part.name, range(part.count))) if i not in gone]
        take_out(self._model, parts)
