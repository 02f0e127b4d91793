"""How much work a file may cause: no more than its own tensors justify, checked before anything is built.

A header of a hundred bytes can ask timm for a million blocks, or for a table of all pairs of positions of a large
window. So a network is first built without memory for its tensors (device `meta`), and what that takes is counted in
modules, function calls, and for detectors the memory of tensors that are made on the CPU all the same. Not in seconds:
a slow machine refuses nothing that a fast one accepts. The limits are above what any network of timm needs
(`tests/test_limits.py`).
"""
import json
import math
import re
import struct
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from timm_lean.errors import CheckpointError

__all__ = [
    'Work', 'allowance', 'check_header_size', 'check_numbers', 'check_steps', 'check_tensors', 'limited', 'parse_entry']

_MAX_HEADER = 16 * 2 ** 20  # bytes of the safetensors header; its parser takes a few times that
_MAX_ENTRY = 4 * 2 ** 20  # characters of a JSON entry in it; parsed, 4 MiB of `[]` take 100 MB
_MAX_TENSORS = 10_000
_MAX_STEPS = 256
_BASE_TOTAL = 50_000  # of the sizes in a network's arguments: widths, depths, image sizes
# Of timm's networks those with most modules and calls have 2,500 and 5 million; most calls per tensor, 6,500, have some
# with up to 500 tensors. `tiny_vit_21m_512` makes 40 million, two per value in its tensors, for it goes through all
# pairs of positions one by one; no other does.
_BASE_MODULES, _MODULES_PER_TENSOR, _MAX_MODULES = 300, 5, 10_000
_BASE_CALLS, _CALLS_PER_TENSOR, _MANY_TENSORS, _CALLS_PER_FURTHER = 300_000, 8_000, 500, 2_500
_PAIRWISE = re.compile(r'tiny_vit')
_CALLS_PER_VALUE, _FREE_VALUES, _MAX_CALLS_BY_VALUES = 2.25, 1_000_000, 45_000_000
_STEPS_FACTOR = 4  # folding takes twice as many calls again
_CALLS_PER_OPERATION = 20  # an operation on tensors under `torch.device` takes the time of so many calls
_OPERATION = getattr(DeviceContext.__torch_function__, '__code__', None)
_BASE_CPU_BYTES, _CPU_BYTES_PER_VALUE = 64 * 2 ** 20, 8  # of all operations on the CPU; some make parameters there


@dataclass
class Work:
    """What building a network took.

    Attributes:
        modules: Modules put into others.
        calls: Calls of functions and returns from them.
        bytes: Memory that its parameters and buffers would take, those replaced on the way included.
        cpu_bytes: Memory that operations on the CPU took, freed or not.
    """
    modules: int = 0
    calls: int = 0
    bytes: int = 0
    cpu_bytes: int = 0


def check_header_size(path: str | Path) -> None:
    """Raise a CheckpointError if a safetensors file has a header that no network needs; nothing else is read."""
    with open(path, 'rb') as f:
        start = f.read(8)
    if len(start) == 8 and struct.unpack('<Q', start)[0] > _MAX_HEADER:
        raise CheckpointError(f'{path} is not a whole safetensors file: its header would be longer than '
                              f'{_MAX_HEADER:,} bytes.')


def parse_entry(text: str, what: str) -> Any:
    """Parse a JSON entry of a header.

    Args:
        text: The entry.
        what: The file and the entry, for messages.

    Raises:
        CheckpointError: It is too long or not JSON.
    """
    if len(text) > _MAX_ENTRY:
        raise CheckpointError(f'{what} is damaged: {len(text):,} characters; expected at most {_MAX_ENTRY:,}.')
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f'{what} is damaged: {e}') from e


def check_tensors(shapes: Collection[Any]) -> None:
    """Raise a CheckpointError if there are more tensors than in any network."""
    if len(shapes) > _MAX_TENSORS:
        raise CheckpointError(f'The file is damaged: {len(shapes):,} tensors; expected at most {_MAX_TENSORS:,}.')


def check_steps(steps: list[Any]) -> None:
    """Raise a CheckpointError if there are more structural steps than anyone takes; each walks the whole network."""
    if len(steps) > _MAX_STEPS:
        raise CheckpointError(f'The file is damaged: {len(steps):,} steps; expected at most {_MAX_STEPS}.')


def check_numbers(arguments: Any, shapes: Mapping[str, tuple[int, ...]], base: int = _BASE_TOTAL) -> None:
    """Raise a CheckpointError if a network's arguments ask for more than its tensors can be.

    Lists as long as a number says are made before any module exists, so the sum of all numbers is limited: by a part
    that all networks may have, and the longest side of a tensor, which goes with the number of classes.

    Args:
        arguments: Plain data.
        shapes: Of the file's tensors.
        base: What any network may have.
    """
    sides = [max(shape) for shape in shapes.values() if shape and 0 not in shape]
    limit = base + 2 * max(sides, default=0)
    total, todo = 0., [arguments]
    while todo:
        item = todo.pop()
        if isinstance(item, (dict, list)):
            todo += item.values() if isinstance(item, dict) else item
        elif isinstance(item, (int, float)):
            total += max(abs(item), 1)
        if not total <= limit:  # nor NaN
            raise CheckpointError(f'The file is damaged: the numbers in the model arguments add up to more than '
                                  f'{limit:,}, which its tensors do not justify.')


def allowance(
        shapes: Mapping[str, tuple[int, ...]], architecture: str = '', steps: bool = False) -> tuple[int, int]:
    """How many modules, and how many calls, a file's tensors justify; arguments as of `limited`."""
    tensors = len(shapes)
    modules = min(_BASE_MODULES + _MODULES_PER_TENSOR * tensors, _MAX_MODULES)
    calls = (_BASE_CALLS + _CALLS_PER_TENSOR * min(tensors, _MANY_TENSORS)
             + _CALLS_PER_FURTHER * max(tensors - _MANY_TENSORS, 0))
    if _PAIRWISE.match(architecture):
        values = max(sum(map(math.prod, shapes.values())) - _FREE_VALUES, 0)
        calls += min(int(_CALLS_PER_VALUE * values), _MAX_CALLS_BY_VALUES)
    return (_STEPS_FACTOR * modules, _STEPS_FACTOR * calls) if steps else (modules, calls)


@contextmanager
def limited(
        shapes: Mapping[str, tuple[int, ...]], architecture: str = '', *, steps: bool = False, cpu_memory: bool = False,
) -> Iterator[Work]:
    """Stop the construction of a network that takes more work than the file's tensors can explain.

    Args:
        shapes: Of the file's tensors.
        architecture: The timm name, for there are some that take more than others.
        steps: Whether structural steps are taken too.
        cpu_memory: Also limit what operations on the CPU take, which MMDetection's constructors do on any device.

    Raises:
        CheckpointError: At the limit, from within the construction.
    """
    work, tensors = Work(), len(shapes)
    max_modules, max_calls = allowance(shapes, architecture, steps)

    def count_module(*args: Any) -> None:
        work.modules += 1
        if work.modules > max_modules:
            raise CheckpointError(f'The header asks for a network of more than {max_modules:,} modules, which the '
                                  f'{tensors:,} tensors of the file do not justify.')

    def count_bytes(module: nn.Module, name: str, tensor: Any) -> None:
        if tensor is not None:
            work.bytes += tensor.numel() * tensor.element_size()

    def count_call(frame: Any, event: str, argument: Any) -> None:
        work.calls += _CALLS_PER_OPERATION if event == 'call' and frame.f_code is _OPERATION else 1
        if work.calls > max_calls:
            raise CheckpointError(f'The header asks for a network that takes more than {max_calls:,} calls to build, '
                                  f'which the {tensors:,} tensors of the file do not justify.')

    register = nn.modules.module
    handles = [
        register.register_module_module_registration_hook(count_module),
        register.register_module_parameter_registration_hook(count_bytes),
        register.register_module_buffer_registration_hook(count_bytes)]
    profile = sys.getprofile()
    sys.setprofile(count_call)
    try:
        with _CpuMemory(work, shapes) if cpu_memory else nullcontext():
            yield work
    finally:
        sys.setprofile(None)
        if callable(profile):
            sys.setprofile(profile)
        elif profile is not None:  # cProfile's own object
            profile.enable()
        for handle in handles:
            handle.remove()


class _CpuMemory(TorchDispatchMode):
    """Refuses operations that would take much memory on the CPU before they do."""

    def __init__(self, work: Work, shapes: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self.work, self.limit = work, _BASE_CPU_BYTES + _CPU_BYTES_PER_VALUE * sum(map(math.prod, shapes.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _on_meta(args, kwargs):
            self.work.cpu_bytes += _result_bytes(func, args, kwargs)
            if self.work.cpu_bytes > self.limit:
                raise CheckpointError(f'The header asks for a network that computes tables of more than '
                                      f'{self.limit >> 20} MB while it is built.')
        return func(*args, **kwargs)


def _on_meta(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation takes no memory, by its device or its first tensor; for the few others more is looked at."""
    if (device := kwargs.get('device')) is not None:
        return torch.device(device).type == 'meta'
    first = args[0] if args else None
    return first.is_meta if isinstance(first, torch.Tensor) else False


def _result_bytes(func: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """The new memory an operation would take, found out on the device `meta`; 0 where the values decide."""
    def skeleton(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device='meta')

    if any(result.alias_info is not None for result in func._schema.returns):
        return 0  # a view, or in place
    args, kwargs = tree_map_only(torch.Tensor, skeleton, (args, kwargs))
    if kwargs.get('device') is not None or not any(isinstance(a, torch.Tensor) for a in tree_leaves((args, kwargs))):
        kwargs = {**kwargs, 'device': torch.device('meta')}
    try:
        results = func(*args, **kwargs)
    except (RuntimeError, TypeError):  # such as `nonzero` and `item`; not larger than their inputs
        return 0
    return sum(t.numel() * t.element_size() for t in tree_leaves(results) if isinstance(t, torch.Tensor))
