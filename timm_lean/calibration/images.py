"""The calibration images: taken from a loader once, checked, cut into pieces, a quarter held out."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves, tree_map

from timm_lean.errors import LeanError

from .settings import Calibration

__all__ = ['Chunk', 'load_chunks', 'of_samples', 'pick_positions']

HELD_OUT = 4  # every fourth image is held out
_CHUNK_VALUES = 2 ** 22  # numbers in one piece: 27 images of 224 x 224 pixels, 1,365 of 32 x 32
_CHUNK_IMAGES = 256
_SAMPLES_PER_INPUT = 24
_LEAST_SAMPLES = 8192


def _call(network: nn.Module, images: torch.Tensor) -> Any:
    return network(images)


@dataclass(frozen=True)
class Chunk:
    """Images that go through the networks together.

    Attributes:
        load: Gives images `[B, C, H, W]`, or what `forward` takes; the same ones whenever it is called.
        held: Which of its images are held out, `[B]` on the CPU.
        forward: Runs a network on it.
    """
    load: Callable[[], Any]
    held: torch.Tensor
    forward: Callable[[nn.Module, Any], Any] = _call

    @property
    def batch(self) -> Any:
        return self.load()

    def run(self, network: nn.Module) -> Any:
        """The outputs of a network, the batch moved to where its parameters are."""
        return self.forward(network, self.on(next(network.parameters()).device))

    def on(self, device: torch.device) -> Any:
        """The batch on a device."""
        return tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, 'to') else leaf, self.batch)

    def part(self, held: bool) -> 'Chunk | None':
        """The images that are held out, or the others; None if there are none."""
        chosen = self.held if held else ~self.held
        if bool(chosen.all()):
            return self
        if not bool(chosen.any()):
            return None
        return Chunk(lambda: self.batch[chosen], self.held[chosen], self.forward)

    def sample(self) -> 'Chunk':
        """As little of it as shows how a network runs: two copies of one image, or a batch not looked into."""
        if self.forward is not _call:
            return self
        two = torch.cat([self.batch[:1]] * 2)
        return Chunk(lambda: two, self.held[:1].repeat(2), self.forward)

    @property
    def bytes(self) -> int:
        """Of its tensors."""
        return sum(leaf.nbytes for leaf in tree_leaves(self.batch) if isinstance(leaf, torch.Tensor))


def load_chunks(calibration: Calibration) -> list[Chunk]:
    """Take all images of a loader; what else its batches hold (labels) is never looked at.

    The batches of a sequence are asked for whenever they are needed instead of being kept.

    Raises:
        LeanError: There are no images or too few to hold some out, something that is no image batch, NaN.
    """
    chunks = _whole_batches(calibration) if calibration.forward is not None else _image_chunks(calibration)
    count = sum(len(chunk.held) for chunk in chunks)
    if count < HELD_OUT:
        raise LeanError(f'Calibration needs images, at least {HELD_OUT} as a quarter is held out, and a few hundred to '
                        f'be of use; got {count or "none"}.')
    if len({bool(chunk.held[0]) for chunk in chunks}) == 1 and calibration.forward is not None:
        raise LeanError(f'Calibration with forward= needs at least {HELD_OUT} batches, as every fourth is held out; '
                        f'got {len(chunks)}.')
    return chunks


def of_samples(held: torch.Tensor, samples: int) -> torch.Tensor:
    """Which of a layer's samples belong to held-out images, `[samples]`, from the same of images, `[B]`."""
    if samples % len(held) == 0:
        return held.repeat_interleave(samples // len(held))
    return held[:1].expand(samples)  # boxes of a detector, say: their batch is held out as a whole


def _image_chunks(calibration: Calibration) -> list[Chunk]:
    chunks: list[Chunk] = []
    count = 0
    batches: Any = calibration.hold().batches
    for index in range(len(batches)):
        images = _images(batches[index])
        if not isinstance(images, torch.Tensor) or images.ndim < 2 or not images.is_floating_point():
            kind = f'{list(images.shape)} {images.dtype}' if isinstance(images, torch.Tensor) else type(images).__name__
            raise LeanError(f'Calibration needs batches of images [B, C, H, W] as float tensors, or tuples that start '
                            f'with them, got {kind}.')
        _check_finite(images, f'images {count} to {count + len(images) - 1}')
        size = max(1, min(_CHUNK_IMAGES, _CHUNK_VALUES // max(images[:1].numel(), 1)))
        for start in range(0, len(images), size):
            numbers = torch.arange(count, count + min(size, len(images) - start))
            chunks.append(Chunk(partial(_piece, batches, index, start, size), numbers % HELD_OUT == HELD_OUT - 1))
            count += len(numbers)
    return chunks


def _images(batch: Any) -> Any:
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def _piece(batches: Sequence[Any], index: int, start: int, size: int) -> torch.Tensor:
    return _images(batches[index]).detach()[start:start + size]


def _whole_batches(calibration: Calibration) -> list[Chunk]:
    """Batches that only the caller's `forward` understands."""
    assert calibration.forward is not None
    chunks = []
    batches: Any = calibration.hold().batches
    for index, batch in enumerate(batches):
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            _check_finite(tensor, f'images of batch {index}')
        stacked = [len(tensor) for tensor in tensors if tensor.ndim == 4]
        count = stacked[0] if stacked else max(sum(tensor.ndim == 3 for tensor in tensors), 1)
        held = torch.full((count,), index % HELD_OUT == HELD_OUT - 1)
        chunks.append(Chunk(partial(batches.__getitem__, index), held, calibration.forward))
    return chunks


def _check_finite(images: torch.Tensor, which: str) -> None:
    if not bool(torch.isfinite(images).all()):
        raise LeanError(f'The calibration {which} hold NaN or infinity.')


def pick_positions(
        count: int, most: int, inputs: int, images: int, seed: int, device: torch.device) -> torch.Tensor | None:
    """Which of a map's positions to look at, the same for all images of a piece: no more than a layer needs.

    Args:
        count: Positions of the map.
        most: Positions at most.
        inputs: Inputs of each filter, whose number says how many samples are enough.
        images: Images that are looked at, times the calls of the layer.
        seed: What to draw by.
        device: Where the indices are wanted.

    Returns:
        Indices into the flattened map, in order; None for all.
    """
    wanted = min(most, -(-max(_SAMPLES_PER_INPUT * inputs, _LEAST_SAMPLES) // images))
    if count <= wanted:
        return None
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values.to(device)
