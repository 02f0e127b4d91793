"""Which cuts a network's own code survives: found by trying them.

A model's code may fix channel counts that no graph shows: reshapes into heads, splits in two, tables of widths. What is
tried is a copy on the meta device, which has shapes but no values: to cut it and to run it costs next to nothing.
"""
import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

from .tracker import take_out, together

__all__ = ['EMPTY', 'failing_cuts']

EMPTY = 'a layer that depends on it would be empty'


@torch.no_grad()
def failing_cuts(model: nn.Module, x: torch.Tensor, graph: Any, cuts: Sequence[Any]) -> dict[int, str]:
    """The cuts with which a network does not run.

    Args:
        model: The network, in eval mode; it is not changed.
        x: An input.
        graph: Its dependency graph.
        cuts: Groups of channels to remove, as Torch-Pruning gives them.

    Returns:
        Index of a cut and the error of the network's code, or `EMPTY`. All others can be made together.
    """
    trial = _Trial(model, x, graph, cuts)
    fine: list[int] = []
    failing: dict[int, str] = {}
    stack = [list(range(len(cuts)))]
    while stack:  # what cannot be made beside those before it is halved until the culprits are found
        part = stack.pop()
        error = trial.error([*fine, *part])
        if not error:
            fine += part
        elif len(part) == 1:
            failing[part[0]] = error
        else:
            stack += [part[len(part) // 2:], part[:len(part) // 2]]
    return failing


class _Trial:
    """Copies of a network, cut and run."""

    def __init__(self, model: nn.Module, x: torch.Tensor, graph: Any, cuts: Sequence[Any]):
        self._model, self._graph, self._cuts, self._x = model, graph, cuts, x
        self._meta = True
        self._meta = not self.error([])  # some models look at values

    def error(self, chosen: Sequence[int]) -> str:
        """What goes wrong with some cuts, '' if nothing does."""
        cut = together(self._graph, [self._cuts[index] for index in chosen])
        if any(part.count <= len(part.indices) for part in cut):
            return EMPTY
        try:
            new = self._copy()
            take_out(new, cut)
            new(self._x.to('meta') if self._meta else self._x)
        except Exception as e:  # the model's own code
            return f'{type(e).__name__}: {str(e).partition(chr(10))[0][:100]}'
        return ''

    def _copy(self) -> nn.Module:
        if not self._meta:
            return copy.deepcopy(self._model)
        memo: dict[int, Any] = {}
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            moved = tensor.detach().to('meta')
            memo[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
        return copy.deepcopy(self._model, memo)
