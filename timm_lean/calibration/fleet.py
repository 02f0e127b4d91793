"""All pieces of the images on their way through the original and the compressed network, side by side."""
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn

from .images import Chunk
from .walk import Walk, hooked

__all__ = ['Fleet', 'Pair']


@dataclass
class Pair:
    """One piece of the images in both networks."""
    index: int
    chunk: Chunk
    original: Walk
    ours: Walk


class Fleet:
    """Passes of all pieces, each started when it is first asked for.

    Args:
        original: The original network.
        ours: The compressed one.
        chunks: The pieces.
        device: Where the networks are.
    """

    def __init__(self, original: nn.Module, ours: nn.Module, chunks: Sequence[Chunk], device: torch.device):
        self.networks = original, ours
        self.chunks = chunks
        self.device = device
        self.pairs: list[Pair] = []
        self.start()

    def start(self) -> None:
        """Send all pieces through from the beginning."""
        self.close()
        original, ours = self.networks
        for index, chunk in enumerate(self.chunks):
            images = chunk.images.to(self.device)
            self.pairs.append(Pair(
                index, chunk, Walk(lambda images=images: original(images), after=True),  # type: ignore[misc]
                Walk(lambda images=images: ours(images))))  # type: ignore[misc]

    def close(self) -> None:
        for pair in self.pairs:
            pair.original.close()
            pair.ours.close()
        self.pairs = []


@contextmanager
def fleet(
        original: nn.Module, ours: nn.Module, names: Sequence[str], chunks: Sequence[Chunk], device: torch.device,
) -> Iterator[Fleet]:
    """A fleet that pauses at the named layers of both networks; all its passes end with the block."""
    there = dict(original.named_modules())
    with hooked(original, [name for name in names if name in there]), hooked(ours, names):
        ships = Fleet(original, ours, chunks, device)
        try:
            yield ships
        finally:
            ships.close()
