"""Storage of pruned convolutions: the live kernels and one bit per kernel.

A weight `K` of shape `[N, C, kh, kw]` becomes `K::kernels` `[live, kh, kw]`, the kernels that are not zero in row
order, and `K::mask`, uint8, one bit per kernel in the same order (lowest bit first, zeros at the end). Only kernels
whose every byte is zero are left out, so what is unpacked equals what was packed bit for bit.
"""
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from timm_lean.errors import CheckpointError

from .int8 import INT8

__all__ = ['pack', 'packed_shapes', 'unpack']

_KERNELS, _MASK = '::kernels', '::mask'
# A file may ask for at most this many times its own bytes, so that a small one cannot fill the memory. Of weights with
# fewer live kernels than that, some dead ones are stored too.
_MAX_RATIO = 64
# Packing is worth giving up on plain readers of the file only if the file shrinks by this share.
_MIN_SAVING = 0.05


def pack(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """Pack what gets smaller, if all in all it is worth it.

    Args:
        tensors: A state dict, contiguous.

    Returns:
        The tensors to store, and the names and shapes of those that are packed.
    """
    stored: dict[str, torch.Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in tensors.items():
        parts = _pack_one(name, tensor)
        if parts is None:
            stored[name] = tensor
        else:
            stored[name + _KERNELS], stored[name + _MASK] = parts
            shapes[name] = list(tensor.shape)
    if _bytes(stored.values()) > (1 - _MIN_SAVING) * _bytes(tensors.values()):
        return dict(tensors), {}
    return stored, shapes


def packed_shapes(stored: Mapping[str, tuple[int, ...]], shapes: Any) -> dict[str, tuple[int, ...]]:
    """The shapes a file's tensors have when unpacked, from their stored shapes; nothing is allocated.

    Args:
        stored: Shapes of the tensors in the file.
        shapes: What the header says is packed.

    Raises:
        CheckpointError: The two do not fit together, or little data claims to be a lot.
    """
    if not isinstance(shapes, dict):
        raise CheckpointError(f'"packed" should be an object of names and shapes, got {str(shapes)[:100]!r}.')
    result = dict(stored)
    for name, shape in shapes.items():
        if (not isinstance(shape, list) or len(shape) != 4
                or any(type(n) is not int or not 0 < n < 2 ** 31 for n in shape)):
            raise CheckpointError(f'The packed tensor {name!r} has the shape {str(shape)[:100]}; expected four sizes.')
        kernels, mask = result.pop(name + _KERNELS, None), result.pop(name + _MASK, None)
        if kernels is None or mask is None or name in result:
            raise CheckpointError(f'The packed tensor {name!r} needs {name + _KERNELS!r} and {name + _MASK!r} in the '
                                  'file, and nothing under its own name.')
        count, size = shape[0] * shape[1], shape[2] * shape[3]
        if len(kernels) != 3 or kernels[1:] != tuple(shape[2:]) or kernels[0] > count or mask != (-(-count // 8),):
            raise CheckpointError(f'The packed tensor {name!r} of shape {shape} has kernels {list(kernels)} and a mask '
                                  f'{list(mask)} of bytes, which do not fit.')
        if count * size > _max_ratio(name) * (kernels[0] * size + mask[0]):
            raise CheckpointError(f'The packed tensor {name!r} claims {count * size:,} entries for {kernels[0]:,} '
                                  'kernels; the file is damaged.')
        result[name] = tuple(shape)
    return result


def unpack(name: str, shape: list[int], get: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """One packed tensor as it was.

    Args:
        name: The tensor.
        shape: Its shape, checked by `packed_shapes`.
        get: Reads a stored tensor.

    Raises:
        CheckpointError: The mask does not have the number of kernels there are.
    """
    kernels, packed = get(name + _KERNELS), get(name + _MASK)
    count = shape[0] * shape[1]
    if packed.dtype != torch.uint8:
        raise CheckpointError(f'The mask of the packed tensor {name!r} should be uint8, got {packed.dtype}.')
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)).bitwise_and_(1).flatten().bool()
    mask = bits[:count]
    if int(mask.sum()) != len(kernels) or bool(bits[count:].any()):
        raise CheckpointError(f'The mask of the packed tensor {name!r} marks {int(bits.sum())} kernels of {count}, the '
                              f'file holds {len(kernels)}.')
    dense = kernels.new_zeros(count, *shape[2:])
    dense[mask] = kernels
    return dense.view(shape)


def _max_ratio(name: str) -> int:
    """Entries that one entry or byte of mask in the file may become: those of int8 grow to four bytes besides."""
    return _MAX_RATIO // 4 if name.endswith(INT8) else _MAX_RATIO


def _pack_one(name: str, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Live kernels and mask of a convolution weight, None if they are not smaller."""
    if tensor.ndim != 4 or not tensor.numel() or not (tensor.is_floating_point() or tensor.dtype == torch.int8):
        return None
    rows = tensor.flatten(0, 1)
    # compared as bytes, so that -0.0 is not taken for zero
    # a channels-last 1 x 1 weight counts as contiguous with strides that cannot be viewed as bytes; a copy can
    data = rows.flatten(1).clone(memory_format=torch.contiguous_format)
    live = data.view(torch.uint8).any(1).bool()
    count, size = len(rows), rows[0].numel()
    missing = math.ceil((count * size / _max_ratio(name) - -(-count // 8)) / size) - int(live.sum())
    if missing > 0:
        live[(~live).nonzero()[:missing, 0]] = True
    padded = torch.zeros(-(-count // 8) * 8, dtype=torch.uint8, device=tensor.device)
    padded[:count] = live
    mask = (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8, device=tensor.device)).sum(1, dtype=torch.uint8)
    kernels = rows[live]
    return (kernels, mask) if _bytes([kernels, mask]) < _bytes([tensor]) else None


def _bytes(tensors: Collection[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
