"""Which cuts a network's own code survives: found by trying them.

A model's code may fix channel counts that no graph shows: reshapes into heads, splits in two, tables of widths. What is
tried is a copy on the meta device, which has shapes but no values: to cut it and to run it costs next to nothing.
"""
import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn

__all__ = ['failing_cuts']


@torch.no_grad()
def failing_cuts(model: nn.Module, x: torch.Tensor, graph: Any, cuts: Sequence[Any]) -> dict[int, str]:
    """The cuts with which a network does not run.

    Args:
        model: The network, in eval mode; it is not changed.
        x: An input.
        graph: Its dependency graph.
        cuts: Groups of channels to remove, as Torch-Pruning gives them.

    Returns:
        Index of a cut and the error of the network's code. All others can be made together.
    """
    trial = _Trial(model, x, graph, cuts)
    everything = list(range(len(cuts)))
    if not trial.error(everything):
        return {}
    failing: dict[int, str] = {}
    stack = [everything]
    while stack:  # halves in which something fails alone
        part = stack.pop()
        error = trial.error(part)
        if error and len(part) == 1:
            failing[part[0]] = error
        elif error:
            stack += [part[len(part) // 2:], part[:len(part) // 2]]
    fine = [index for index in everything if index not in failing]
    if trial.error(fine):  # only together: the later ones stay
        rest, fine = fine, []
        for index in rest:
            error = trial.error([*fine, index])
            if error:
                failing[index] = error
            else:
                fine.append(index)
    return failing


class _Trial:
    """Copies of a network, cut and run."""

    def __init__(self, model: nn.Module, x: torch.Tensor, graph: Any, cuts: Sequence[Any]):
        self._model, self._graph, self._cuts, self._x = model, graph, cuts, x
        self._names = {module: name for name, module in model.named_modules()}
        self._meta = True
        self._meta = not self.error([])  # some models look at values

    def error(self, chosen: Sequence[int]) -> str:
        """What goes wrong with some cuts, '' if nothing does."""
        try:
            new = self._copy()
            for target, handler, dim, idxs in self._joined(chosen):
                handler.__self__.pruning_dim = dim
                if isinstance(target, nn.Parameter):
                    owner, _, leaf = self._graph._param_to_name[target].rpartition('.')
                    module = new.get_submodule(owner)
                    setattr(module, leaf, handler(getattr(module, leaf), idxs))
                else:
                    handler(new.get_submodule(self._names[target]), idxs)
            new(self._x.to('meta') if self._meta else self._x)
        except Exception as e:  # the model's own code
            return f'{type(e).__name__}: {str(e).partition(chr(10))[0][:100]}'
        return ''

    def _joined(self, chosen: Sequence[int]) -> list[tuple[Any, Any, int, list[int]]]:
        """What to remove of every layer: its handler, the dimension, and the numbers before anything is removed."""
        found: dict[Any, tuple[Any, Any, int, set[int]]] = {}
        for cut in chosen:
            for dep, idxs in self._cuts[cut]:
                target = dep.target.module
                if target in self._names or isinstance(target, nn.Parameter):
                    key = id(target), dep.handler
                    found.setdefault(key, (target, dep.handler, dep.target.pruning_dim, set()))[3].update(idxs)
        return [(target, handler, dim, sorted(idxs)) for target, handler, dim, idxs in found.values()]

    def _copy(self) -> nn.Module:
        if not self._meta:
            return copy.deepcopy(self._model)
        memo: dict[int, Any] = {}
        for tensor in (*self._model.parameters(), *self._model.buffers()):
            moved = tensor.detach().to('meta')
            memo[id(tensor)] = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
        return copy.deepcopy(self._model, memo)
