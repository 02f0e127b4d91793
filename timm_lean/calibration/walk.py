"""Forward passes that pause at chosen layers, so that a layer is fitted before what follows it is computed.

All pieces of the calibration images stand at the same layer at the same time, each in a forward pass of its own; when
the layer has its new weights, all go on. So every image runs through a network once, whatever the network's code does
between its layers. A pass lives in a thread, of which one at a time runs: they are coroutines, not parallel work.

A layer at the end of a residual branch pauses where its output is added (`Join`), not where it is computed.
"""
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ['Join', 'Stop', 'Survey', 'Walk', 'evaluation', 'hooked']

_ADDITIONS = {'add', 'add_', '__add__', '__iadd__', '__radd__'}
_PRODUCTS = {'mul', 'mul_', '__mul__', '__imul__', '__rmul__'}
_HARMLESS = {'__get__', '__set__', '__delete__', 'size', 'dim', 'detach'}  # `x.shape` is a `__get__`
_thread = threading.local()


@dataclass(frozen=True)
class Stop:
    """What a pass has at a layer.

    Attributes:
        inputs: The layer's input.
        outputs: Its output; None before the layer.
    """
    inputs: torch.Tensor
    outputs: torch.Tensor | None


@dataclass
class Join:
    """An addition that a layer's output reaches through nothing but a scale and a shift per channel.

    Attributes:
        layer: Name of the layer.
        inputs: The layer's input; this and the other tensors are there in a `Walk`, not in a `Survey`.
        outputs: Its output.
        scale: `[C]`, or None for 1.
        shift: `[C]`, or None for 0.
        norm: `running_mean` of the batch norm right behind the layer, None if there is none.
        uses: How many operations looked at the tensor that this marks.
        branch: What is added, `scale * outputs + shift`.
        other: What it is added to; both set at the addition.
    """
    layer: str
    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    uses: int = 0
    branch: torch.Tensor | None = None
    other: torch.Tensor | None = None

    def through(self, outputs: torch.Tensor) -> torch.Tensor:
        """The branch that belongs to an output of the layer."""
        dim = _channel_dim(outputs)
        for factor, apply in ((self.scale, torch.mul), (self.shift, torch.add)):
            if factor is not None:
                outputs = apply(outputs, factor.view([-1 if i == dim else 1 for i in range(outputs.ndim)]))
        return outputs

    def scaled(self, factor: torch.Tensor) -> 'Join':
        scale = factor if self.scale is None else self.scale * factor
        shift = None if self.shift is None else self.shift * factor
        return replace(self, scale=scale, shift=shift, uses=0)

    def shifted(self, term: torch.Tensor) -> 'Join':
        return replace(self, shift=term if self.shift is None else self.shift + term, uses=0)


class Walk:
    """One forward pass, to be moved from pause to pause.

    Args:
        forward: Runs the pass, through modules that `hooked` watches.
        joined: The layers at whose additions the pass may have to pause.
    """

    def __init__(self, forward: Callable[[], Any], joined: Collection[str] = ()):
        self._joined = joined
        self._wanted: tuple[str, int] | None = None
        self._where = ''
        self._calls: dict[str, int] = {}
        self._event: Stop | Join | None = None
        self._error: BaseException | None = None
        self._closed = self._done = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, args=(forward,), daemon=True)
        self._thread.start()

    def to(self, layer: str, call: int = 0, where: str = 'before') -> Any:
        """Go on to a call of a layer.

        Args:
            layer: Its name.
            call: Number of the call.
            where: Pause 'before' it, 'after' it, or at the 'sum' that its output is added to.

        Returns:
            A `Stop` or, at a sum, a `Join`; None if the pass ended without getting there.
        """
        self._wanted, self._where = (layer, call), where
        if not self._done:
            self._event = None
            self._go.release()
            self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return self._event

    def close(self) -> None:
        """Give the pass up."""
        self._closed = True
        self._go.release()
        self._thread.join()
        self._event = None

    def _run(self, forward: Callable[[], Any]) -> None:
        self._go.acquire()
        try:
            if not self._closed:
                _thread.walk = self
                with torch.no_grad(), _Additions(self):
                    forward()
        except _Closed:
            pass
        except BaseException as e:  # raised again where the pass is moved from
            self._error = e
        finally:
            self._done, self._event = True, None
            self._stopped.release()

    def _pause(self, event: Stop | Join) -> None:
        self._event = event
        del event
        self._stopped.release()
        self._go.acquire()
        if self._closed:
            raise _Closed

    def before_layer(self, name: str, inputs: torch.Tensor) -> None:
        call = self._calls[name] = self._calls.get(name, -1) + 1
        if self._where == 'before' and self._wanted == (name, call):
            self._pause(Stop(inputs, None))

    def after_layer(self, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        if name in self._joined:
            _mark(outputs, Join(name, inputs, outputs.detach()))
        if self._where == 'after' and self._wanted == (name, self._calls[name]):
            self._pause(Stop(inputs, outputs))

    def at_addition(self, join: Join, branch: torch.Tensor, other: torch.Tensor) -> None:
        if self._where == 'sum' and self._wanted is not None and self._wanted[0] == join.layer:
            join.branch, join.other = branch, other
            self._pause(join)

    def at_use(self, join: Join) -> None:
        pass


class _Closed(BaseException):
    """Ends the thread of a pass that was given up."""


class Survey:
    """What a plain pass meets: the layers in the order in which they can be fitted, and what their outputs reach.

    Attributes:
        calls: The calls of layers, `(layer, number)`, in order.
        held: Bytes of activations that an image holds at each call.
        order: Layers and, of those whose output is added, the additions: `(layer, joined)`.
        counts: How often each layer is called.
        joins: The addition that each layer's output reaches.
        norms: `running_mean` of the batch norm that alone reads a layer's output, and reads nothing else.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.held: list[int] = []
        self.order: list[tuple[str, bool]] = []
        self.counts: dict[str, int] = {}
        self.joins: dict[str, Join] = {}
        self.norms: dict[str, torch.Tensor] = {}
        self._spoiled: set[str] = set()
        self._partners: dict[str, str] = {}

    def run(
            self, model: nn.Module, names: Iterable[str], forward: Callable[[], Any], images: int = 1, size: int = 0,
    ) -> 'Survey':
        """Survey a model in eval mode.

        Args:
            model: The model.
            names: Its layers.
            forward: Runs it.
            images: On so many images.
            size: Bytes of each of them.
        """
        self._images, self._size = images, size
        _thread.walk = self
        try:
            with torch.no_grad(), hooked(names, model), _Additions(self), _Held(model) as self._memory:
                forward()
        finally:
            _thread.walk = None
        for name in self._spoiled:
            self.joins.pop(name, None)
            self.norms.pop(name, None)
        readers = Counter(id(mean) for mean in self.norms.values())
        self.norms = {name: mean for name, mean in self.norms.items() if readers[id(mean)] == 1}
        # of two layers that meet at one addition, the one computed first aims at it
        place = {name: i for i, (name, joined) in enumerate(self.order) if not joined}
        for name, partner in self._partners.items():
            if {name, partner} <= self.joins.keys() and place[partner] < place[name]:
                del self.joins[name]
        return self

    def before_layer(self, name: str, inputs: torch.Tensor) -> None:
        count = self.counts[name] = self.counts.get(name, 0) + 1
        self.calls.append((name, count - 1))
        self.held.append(self._size + self._memory.bytes // self._images)
        if count == 1:
            self.order.append((name, False))
        else:
            self._spoiled.add(name)

    def after_layer(self, name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        _mark(outputs, Join(name))

    def at_addition(self, join: Join, branch: torch.Tensor, other: torch.Tensor) -> None:
        self.joins[join.layer] = join
        partner = getattr(other, '_lean_join', None)
        if partner is not None:
            self._partners[join.layer] = partner.layer
        self.order.append((join.layer, True))

    def at_use(self, join: Join) -> None:
        join.uses += 1
        if join.uses > 1:
            self._spoiled.add(join.layer)
        if join.norm is not None:
            self.norms[join.layer] = join.norm


class _Held(TorchDispatchMode):
    """Counts the bytes of all tensors alive that were made within."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.bytes = 0
        self._sizes = {t.untyped_storage()._cdata: 0 for t in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        return out

    def _gone(self, storage: int) -> None:
        self.bytes -= self._sizes.pop(storage, 0)


class _Additions(TorchFunctionMode):
    """Follows marked outputs of layers through scales and shifts to the addition they reach."""

    def __init__(self, walk: Walk | Survey):
        super().__init__()
        self.walk = walk

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        marks = [a._lean_join for a in args if isinstance(a, torch.Tensor) and hasattr(a, '_lean_join')]
        if not marks or name in _HARMLESS:
            return func(*args, **kwargs)
        for join in marks:
            self.walk.at_use(join)
        if name in _ADDITIONS and len(args) == 2 and not kwargs and _same_shape(args):
            for branch, other in (args, args[::-1]):
                join = getattr(branch, '_lean_join', None)
                if join is not None:
                    self.walk.at_addition(join, branch, other)
            return _unmarked(func(*args))
        through = _through(func, name, args, kwargs)
        out = _unmarked(func(*args, **kwargs))
        if through is not None:
            _mark(out, through)
        return out


def _mark(tensor: Any, join: Join) -> None:
    tensor._lean_join = join


def _unmarked(out: Any) -> Any:
    """What was done in place returns the tensor that bears the mark of its value before."""
    if hasattr(out, '_lean_join'):
        del out._lean_join
    return out


def _through(func: Any, name: str, args: Any, kwargs: Any) -> Join | None:
    """The mark of an operation's result, None where more happens than a scale and a shift per channel."""
    x = args[0]
    join = getattr(x, '_lean_join', None)
    if func is F.batch_norm and join is not None:
        mean, var, weight, bias, training, _, eps = _batch_norm_arguments(*args, **kwargs)
        if training or mean is None:
            return None
        scale = torch.rsqrt(var + eps) if weight is None else weight * torch.rsqrt(var + eps)
        result = join.scaled(scale).shifted(-mean * scale if bias is None else bias - mean * scale)
        result.norm = mean if join.scale is None and join.shift is None else None
        return result
    if func is F.dropout and join is not None:
        training = args[2] if len(args) > 2 else kwargs.get('training', True)
        return None if training else join
    if name in _PRODUCTS | _ADDITIONS and len(args) == 2 and not kwargs:
        tensor, factor = args if join is not None else args[::-1]
        join = tensor._lean_join
        if not isinstance(factor, torch.Tensor) or not _per_channel(factor, tensor):
            return None
        return join.scaled(factor.flatten()) if name in _PRODUCTS else join.shifted(factor.flatten())
    return None


def _batch_norm_arguments(
        input: Any, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None, training: bool = False,
        momentum: float = 0.1, eps: float = 1e-5) -> tuple[Any, ...]:
    return running_mean, running_var, weight, bias, training, momentum, eps


def _channel_dim(x: torch.Tensor) -> int:
    return 1 if x.ndim == 4 else x.ndim - 1


def _per_channel(factor: torch.Tensor, x: torch.Tensor) -> bool:
    shape = [1] * (x.ndim - factor.ndim) + list(factor.shape)
    return shape == [n if i == _channel_dim(x) else 1 for i, n in enumerate(x.shape)]


def _same_shape(args: Any) -> bool:
    return all(isinstance(a, torch.Tensor) for a in args) and args[0].shape == args[1].shape


@contextmanager
def hooked(names: Iterable[str], *models: nn.Module) -> Iterator[None]:
    """Within, the passes of models notice the named layers, as far as a model has them."""
    def before(name: str) -> Callable[..., None]:
        return lambda module, args: _thread.walk.before_layer(name, args[0]) if _watched(args) else None

    def after(name: str) -> Callable[..., None]:
        return lambda module, args, out: _thread.walk.after_layer(name, args[0], out) if _watched(args) else None

    handles = []
    for model in models:
        modules = dict(model.named_modules())
        for name in names:
            if name in modules:
                handles += [modules[name].register_forward_pre_hook(before(name)),
                            modules[name].register_forward_hook(after(name))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watched(args: Any) -> bool:
    return bool(args) and getattr(_thread, 'walk', None) is not None


@contextmanager
def evaluation(*models: nn.Module) -> Iterator[None]:
    """Within, the models are in eval mode."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
