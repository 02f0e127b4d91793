"""Which channels of a model are left, kept account of while groups of channels are cut one after the other."""
from typing import Any

import torch.nn as nn

__all__ = ['ChannelTracker']


class ChannelTracker:
    """Cuts groups of channels of a model.

    Attributes:
        kept: Of every module that lost output channels, the first numbers of those it still has.
        kept_inputs: The same of input channels, for layers that mix them.
    """

    def __init__(self, model: nn.Module):
        self._names = {module: name for name, module in model.named_modules()}
        self.kept: dict[str, list[int]] = {}
        self.kept_inputs: dict[str, list[int]] = {}

    def cut(self, group: Any) -> None:
        """Remove a group's channels."""
        for dep, idxs in group:
            module, pruner = dep.target.module, dep.handler.__self__
            name = self._names.get(module)
            if name is None:
                continue  # an operation, not a layer
            if 'out_channels' in dep.handler.__name__:
                kept, count = self.kept, pruner.get_out_channels(module)
            else:
                kept, count = self.kept_inputs, pruner.get_in_channels(module)
            gone = set(idxs)
            kept[name] = [channel for i, channel in enumerate(kept.get(name, range(count))) if i not in gone]
        group.prune()
