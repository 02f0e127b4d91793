"""Storage of weights as int8: one float scale for each filter.

A weight `K` of shape `[N, ...]` becomes `K::int8`, of the same shape, and `K::scale`, float32 `[N]`:
`K[n] = scale[n] * int8[n]`, with the scale that makes the largest entry of the filter 127. Zeros stay zeros, so that
pruned kernels can be packed as well. Weights are those of convolutions, bases, coefficients and linear layers: entries
named `*.weight` of two or more dimensions. Everything else stays as it is.
"""
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from timm_lean.errors import CheckpointError, LeanError

__all__ = ['INT8', 'Int8Report', 'LayerError', 'dequantize', 'int8_shapes', 'quantize']

INT8, _SCALE = '::int8', '::scale'
_LARGEST = 127


@dataclass(frozen=True)
class LayerError:
    """What rounding does to one weight.

    Attributes:
        name: The weight.
        shape: Its shape.
        error: Norm of the difference, relative to the weight's.
    """
    name: str
    shape: tuple[int, ...]
    error: float


@dataclass(frozen=True)
class Int8Report:
    """Which weights are stored as int8.

    Attributes:
        layers: One entry for each of them.
        bytes: Of all tensors before and after, not packed.
    """
    layers: tuple[LayerError, ...]
    bytes: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        return asdict(self)

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [6])
        lines = [f'{"weight":{width}}  error of int8']
        lines += [f'{layer.name:{width}}  {100 * layer.error:.2f} %' for layer in self.layers]
        return '\n'.join([*lines, f'tensors {self.bytes[0]:,} -> {self.bytes[1]:,} bytes'])


def quantize(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str], Int8Report]:
    """Round the weights of a state dict, where that makes them smaller.

    Returns:
        The tensors to store, the names of the weights that are int8, and a report.

    Raises:
        LeanError: A weight has values that are not finite.
    """
    stored: dict[str, torch.Tensor] = {}
    layers = []
    for name, tensor in tensors.items():
        rows = len(tensor) if tensor.ndim else 0
        small = tensor.numel() + 4 * rows
        if not (name.endswith('weight') and tensor.ndim >= 2 and tensor.is_floating_point()
                and 0 < small < tensor.numel() * tensor.element_size()):
            stored[name] = tensor
            continue
        if not tensor.isfinite().all():
            raise LeanError(f'{name} has values that are not finite, which int8 cannot hold. Save the model with '
                            "weights='float'.")
        values, scale = _round(tensor.float())
        stored[name + INT8], stored[name + _SCALE] = values, scale
        wanted = tensor.double()
        lost = _restore(values, scale).double() - wanted
        layers.append(LayerError(name, tuple(tensor.shape), float(lost.norm() / wanted.norm().clamp_min(1e-300))))
    report = Int8Report(tuple(layers), (_bytes(tensors.values()), _bytes(stored.values())))
    return stored, [layer.name for layer in layers], report


def int8_shapes(stored: Mapping[str, tuple[int, ...]], names: Any) -> dict[str, tuple[int, ...]]:
    """The shapes that stored tensors have as floats; nothing is read.

    Args:
        stored: Shapes in the file, packed ones as they will be.
        names: What the header says is int8.

    Raises:
        CheckpointError: The two do not fit together.
    """
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f'"int8" should be a list of names, got {str(names)[:100]!r}.')
    result = dict(stored)
    for name in names:
        shape, scale = result.pop(name + INT8, None), result.pop(name + _SCALE, None)
        if shape is None or scale is None or name in result:
            raise CheckpointError(f'The int8 weight {name[:100]!r} needs {name[:100] + INT8!r} and '
                                  f'{name[:100] + _SCALE!r} in the file, and nothing under its own name.')
        if len(shape) < 2 or scale != shape[:1]:
            raise CheckpointError(f'The int8 weight {name!r} of shape {list(shape)} has scales {list(scale)}; expected '
                                  'two dimensions or more and one scale for each filter.')
        result[name] = shape
    return result


def dequantize(name: str, get: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """One weight as float32.

    Args:
        name: The weight, checked by `int8_shapes`.
        get: Reads a stored tensor, packed ones as they were.

    Raises:
        CheckpointError: The tensors are of other types, or a scale is negative or not finite.
    """
    values, scale = get(name + INT8), get(name + _SCALE)
    if values.dtype != torch.int8 or scale.dtype != torch.float32:
        raise CheckpointError(f'The int8 weight {name!r} is stored as {values.dtype} with scales of {scale.dtype}; '
                              'expected int8 and float32.')
    if not bool(((scale >= 0) & scale.isfinite()).all()):
        raise CheckpointError(f'The int8 weight {name!r} has scales that are negative or not finite.')
    return _restore(values, scale)


def _round(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 values and float32 scales of `[N, ...]`."""
    scale = weight.flatten(1).abs().amax(1) / _LARGEST
    divisor = torch.where(scale > 0, scale, 1.)
    values = (weight / _by_row(divisor, weight)).round().clamp_(-_LARGEST, _LARGEST)
    return values.to(torch.int8), scale


def _restore(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return values.float() * _by_row(scale, values)


def _by_row(scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return scale.view(-1, *[1] * (like.ndim - 1))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
