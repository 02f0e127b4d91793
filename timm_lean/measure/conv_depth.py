"""Number of convolutions on the longest path through a network, by tracing one forward pass.

Every tensor is given a depth: that of the deepest tensor it was computed from, plus one if a convolution computed it.
The count is of what runs, so it holds for any model that timm can create and needs no knowledge of its blocks.

Limits, stated first: 1 x 1 convolutions count like others, also those in attention gates (squeeze and excitation adds
two per block); linear layers and matrix products do not. A convolution by shared filters and coefficients
(`SharedBasisConv2d`) counts once: there is no activation in it, and it folds into one convolution.
"""
from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.models import get_model_input_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_lean.errors import LeanError
from timm_lean.layers import SharedBasisConv2d, SharedBasisLinear

__all__ = ['conv_depth', 'module_depths']

_CONVOLUTIONS = {torch.ops.aten.convolution.default, torch.ops.aten.convolution_overrideable.default}


class _DepthMode(TorchDispatchMode):
    """Keeps the depth of every tensor by its storage, so that views and in-place operations are covered."""

    def __init__(self) -> None:
        super().__init__()
        self._depth: dict[int, int] = {}
        self._alive: list[torch.UntypedStorage] = []  # a freed storage's address could be given to another

    def depth(self, values: Any) -> int:
        return max((self._depth.get(_key(t), 0) for t in tree_leaves(values) if isinstance(t, torch.Tensor)), default=0)

    def set_depth(self, values: Any, depth: int) -> None:
        for t in tree_leaves(values):
            if isinstance(t, torch.Tensor):
                if _key(t) not in self._depth:
                    self._alive.append(t.untyped_storage())
                self._depth[_key(t)] = depth

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        depth = self.depth((args, kwargs)) + (func in _CONVOLUTIONS)
        out = func(*args, **(kwargs or {}))
        self.set_depth(out, depth)
        return out


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def conv_depth(model: nn.Module, input_size: Sequence[int] | None = None) -> int:
    """Count the convolutions on the longest path from a model's input to its outputs.

    Args:
        model: The model; it runs once in eval mode, where it is (a model on the meta device costs nothing).
        input_size: `[C, H, W]` of the input; the model's own if None.

    Raises:
        LeanError: The model cannot run on such an input.
    """
    return _trace(model, input_size)['']


def module_depths(model: nn.Module, names: Collection[str], input_size: Sequence[int] | None = None) -> dict[str, int]:
    """Count the convolutions on the longest path from a model's input to the output of each of its named modules.

    Args:
        model: As in `conv_depth`.
        names: Names of modules, each of which runs once.
        input_size: As in `conv_depth`.

    Raises:
        LeanError: The model cannot run on such an input.
    """
    depths = _trace(model, input_size, names)
    return {name: depths[name] for name in names}


@torch.no_grad()
def _trace(model: nn.Module, input_size: Sequence[int] | None, names: Collection[str] = ()) -> dict[str, int]:
    """Depths of the outputs of the named modules and, as '', of the whole model."""
    if input_size is None:
        input_size = get_model_input_config(model)['input_size']
    parameter = next(model.parameters(), torch.zeros(()))
    x = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    training, mode = model.training, _DepthMode()
    before: list[int] = []
    depths: dict[str, int] = {}

    def enter(module: nn.Module, args: Any) -> None:
        before.append(mode.depth(args))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        mode.set_depth(out, before.pop() + 1)

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, SharedBasisConv2d) and not isinstance(module, SharedBasisLinear):
            handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        if name in names:
            handles.append(module.register_forward_hook(
                lambda module, args, out, name=name: depths.update({name: mode.depth(out)})))
    try:
        with mode:
            out = model.eval()(x)
        return {**depths, '': mode.depth(out)}
    except (RuntimeError, ValueError, TypeError) as e:
        raise LeanError(f'{type(model).__name__} does not run on an input of {list(input_size)}, so its depth cannot '
                        f'be counted: {str(e).splitlines()[0] if str(e) else type(e).__name__}') from e
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
