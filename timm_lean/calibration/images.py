"""The calibration images: taken from a loader once, checked, cut into pieces, a quarter held out."""
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from timm_lean.errors import LeanError

__all__ = ['Chunk', 'load_chunks', 'pick_positions']

HELD_OUT = 4  # every fourth image is held out
_CHUNK_VALUES = 2 ** 22  # numbers in one piece: 27 images of 224 x 224 pixels, 1,365 of 32 x 32
_CHUNK_IMAGES = 256
_SAMPLES_PER_INPUT = 24
_LEAST_SAMPLES = 8192


@dataclass(frozen=True)
class Chunk:
    """Images that go through the networks together.

    Attributes:
        images: `[B, C, H, W]`.
        held: Which of them are held out, `[B]` on the CPU.
    """
    images: torch.Tensor
    held: torch.Tensor


def load_chunks(batches: Iterable[Any]) -> list[Chunk]:
    """Take all images of a loader; what else its batches hold (labels) is never looked at.

    Args:
        batches: Images `[B, C, H, W]`, or tuples that start with them.

    Raises:
        LeanError: There are no images or too few to hold some out, something that is no image batch, NaN.
    """
    if isinstance(batches, torch.Tensor):
        raise LeanError(f'Calibration needs an iterable of image batches, got one tensor {list(batches.shape)}: '
                        'give [images].')
    chunks: list[Chunk] = []
    count = 0
    for batch in batches:
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(images, torch.Tensor) or images.ndim < 2 or not images.is_floating_point():
            kind = f'{list(images.shape)} {images.dtype}' if isinstance(images, torch.Tensor) else type(images).__name__
            raise LeanError(f'Calibration needs batches of images [B, C, H, W] as float tensors, or tuples that start '
                            f'with them, got {kind}.')
        if not bool(torch.isfinite(images).all()):
            raise LeanError(f'The calibration images {count} to {count + len(images) - 1} hold NaN or infinity.')
        size = max(1, min(_CHUNK_IMAGES, _CHUNK_VALUES // max(images[:1].numel(), 1)))
        for piece in images.detach().split(size) if len(images) else ():
            held = torch.arange(count, count + len(piece)) % HELD_OUT == HELD_OUT - 1
            chunks.append(Chunk(piece, held))
            count += len(piece)
    if count < HELD_OUT:
        raise LeanError(f'Calibration needs images, at least {HELD_OUT} as a quarter is held out, and a few hundred to '
                        f'be of use; got {count or "none"}.')
    return chunks


def pick_positions(
        count: int, most: int, inputs: int, images: int, seed: int, device: torch.device) -> torch.Tensor | None:
    """Which of a map's positions to look at, the same for all images of a piece: no more than a layer needs.

    Args:
        count: Positions of the map.
        most: Positions at most.
        inputs: Inputs of each filter, whose number says how many samples are enough.
        images: Images in all.
        seed: What to draw by.
        device: Where the indices are wanted.

    Returns:
        Indices into the flattened map, in order; None for all.
    """
    wanted = min(most, -(-max(_SAMPLES_PER_INPUT * inputs, _LEAST_SAMPLES) // images))
    if count <= wanted:
        return None
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values.to(device)
