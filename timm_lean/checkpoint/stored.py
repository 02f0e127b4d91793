"""Tensors as a file holds them: packed, as int8, or plain. Writing, and reading back with nothing taken on trust."""
from collections.abc import Callable, Mapping
from typing import Any

import torch

from timm_lean.errors import LeanError

from .int8 import Int8Report, dequantize, int8_shapes, quantize
from .limits import check_tensors
from .packing import pack, packed_shapes, unpack

__all__ = ['WEIGHTS', 'Stored', 'store']

WEIGHTS = ('float', 'int8')


def store(
        tensors: dict[str, torch.Tensor], weights: str, packed: bool,
) -> tuple[dict[str, torch.Tensor], dict[str, Any], Int8Report | None]:
    """Bring tensors into the form in which they are stored.

    Args:
        tensors: A state dict, contiguous.
        weights: 'float' (as they are) or 'int8'.
        packed: Leave dead kernels out, if that is worth it.

    Returns:
        The tensors for the file, what its header must say of them, and for int8 the error of each weight.

    Raises:
        LeanError: Unknown `weights`, or values that int8 cannot hold.
    """
    if weights not in WEIGHTS:
        raise LeanError(f'Weights are stored as {" or ".join(map(repr, WEIGHTS))}, not as {weights!r}.')
    header: dict[str, Any] = {}
    report = None
    if weights == 'int8':
        tensors, names, report = quantize(tensors)
        if names:
            header['int8'] = names
    if packed:
        tensors, shapes = pack(tensors)
        if shapes:
            header['packed'] = shapes
    return tensors, header, report


class Stored:
    """Reads the tensors of an open safetensors file as what they stand for.

    Args:
        file: From `safetensors.safe_open`.
        header: With what `store` said.

    Attributes:
        shapes: Of all tensors by name; none of them is read for it.

    Raises:
        CheckpointError: Header and file do not fit together.
    """

    def __init__(self, file: Any, header: Mapping[str, Any]):
        self._file, self._packed, self._int8 = file, header.get('packed', {}), header.get('int8', [])
        names = file.keys()
        check_tensors(names)
        shapes = packed_shapes({name: tuple(file.get_slice(name).get_shape()) for name in names}, self._packed)
        self.shapes = int8_shapes(shapes, self._int8)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, those of int8 as float32.

        Raises:
            CheckpointError: What is stored does not make sense.
        """
        int8 = set(self._int8)
        return {name: dequantize(name, self._get) if name in int8 else self._get(name) for name in self.shapes}

    def _get(self, name: str) -> torch.Tensor:
        get: Callable[[str], torch.Tensor] = self._file.get_tensor
        return unpack(name, self._packed[name], get) if name in self._packed else get(name)
