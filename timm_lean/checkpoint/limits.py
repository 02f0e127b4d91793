"""How much work a file may cause: no more than its own tensors justify, checked before anything is built.

A header of a hundred bytes can ask timm for a million blocks, or for a table of all pairs of positions of a large
window. So a network is first built without memory for its tensors (device `meta`), and what that takes is counted in
modules and function calls. Not in seconds: a slow machine refuses nothing that a fast one accepts. The limits are
several times what any network of timm needs (`tests/test_limits.py`).
"""
import json
import math
import struct
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn as nn

from timm_lean.errors import CheckpointError

__all__ = ['Work', 'check_header_size', 'check_numbers', 'check_steps', 'check_tensors', 'limited', 'parse_entry']

_MAX_HEADER = 16 * 2 ** 20  # bytes of the safetensors header; its parser takes a few times that
_MAX_ENTRY = 4 * 2 ** 20  # characters of a JSON entry in it; parsed, 4 MiB of `[]` take 100 MB
_MAX_TENSORS = 10_000
_MAX_STEPS = 256
_BASE_TOTAL = 50_000  # of the sizes in a network's arguments: widths, depths, image sizes
# Of timm's networks those with most modules and calls have 1,800 and 5 million. `tiny_vit_21m_512` makes 40 million,
# two per value in its tensors, for it goes through all pairs of positions one by one.
_BASE_MODULES, _MODULES_PER_TENSOR, _MAX_MODULES = 300, 5, 10_000
_BASE_CALLS, _CALLS_PER_TENSOR, _MAX_CALLS = 300_000, 8_000, 8_000_000
_CALLS_PER_VALUE, _FREE_VALUES, _MAX_CALLS_BY_VALUES = 2, 1_000_000, 45_000_000
_STEPS_FACTOR = 4  # folding takes twice as many calls again


@dataclass
class Work:
    """What building a network took.

    Attributes:
        modules: Modules put into others.
        calls: Calls of functions and returns from them.
        bytes: Memory that its parameters and buffers would take, those replaced on the way included.
    """
    modules: int = 0
    calls: int = 0
    bytes: int = 0


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


def check_numbers(arguments: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise a CheckpointError if a network's arguments ask for more than its tensors can be.

    Lists as long as a number says are made before any module exists, so the sum of all numbers is limited: by a part
    that all networks may have, and the longest side of a tensor, which goes with the number of classes.

    Args:
        arguments: Plain data.
        shapes: Of the file's tensors.
    """
    sides = [max(shape) for shape in shapes.values() if shape and 0 not in shape]
    limit = _BASE_TOTAL + 2 * max(sides, default=0)
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


@contextmanager
def limited(shapes: Mapping[str, tuple[int, ...]], steps: bool = False) -> Iterator[Work]:
    """Stop the construction of a network that takes more work than the file's tensors can explain.

    Args:
        shapes: Of the file's tensors.
        steps: Whether structural steps are taken too.

    Raises:
        CheckpointError: At the limit, from within the construction.
    """
    work = Work()
    tensors = len(shapes)
    max_modules = min(_BASE_MODULES + _MODULES_PER_TENSOR * tensors, _MAX_MODULES)
    max_calls = min(_BASE_CALLS + _CALLS_PER_TENSOR * tensors, _MAX_CALLS)
    values = max(sum(map(math.prod, shapes.values())) - _FREE_VALUES, 0)
    max_calls += min(_CALLS_PER_VALUE * values, _MAX_CALLS_BY_VALUES)
    if steps:
        max_modules, max_calls = _STEPS_FACTOR * max_modules, _STEPS_FACTOR * max_calls

    def count_module(*args: Any) -> None:
        work.modules += 1
        if work.modules > max_modules:
            raise CheckpointError(f'The header asks for a network of more than {max_modules:,} modules, which the '
                                  f'{tensors:,} tensors of the file do not justify.')

    def count_bytes(module: nn.Module, name: str, tensor: Any) -> None:
        if tensor is not None:
            work.bytes += tensor.numel() * tensor.element_size()

    def count_call(*args: Any) -> None:
        work.calls += 1
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
        yield work
    finally:
        sys.setprofile(profile)
        for handle in handles:
            handle.remove()
