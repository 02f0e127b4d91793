"""All pieces of the images on their way through one or two networks, side by side, within a limit of memory.

What a pass holds at a layer differs along a network, most at its beginning. So pieces set out as the memory that those
before them hold allows: the first layers, which see thousands of positions of each image, are fitted to some of the
images, and the last ones to all. Every image goes through each network once.
"""
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn

from timm_lean.layers.precision import check_float32

from .images import Chunk
from .walk import Survey, Walk, hooked

__all__ = ['Fleet', 'Ship', 'fleet', 'survey']


@dataclass
class Ship:
    """One piece of the images, in all networks.

    Attributes:
        index: Number of the piece.
        held: Which of its images are held out, `[B]`, on the networks' device.
        walks: Its passes, one of each network.
    """
    index: int
    held: torch.Tensor
    walks: list[Walk]


class Fleet:
    """Passes of all pieces through some networks; made by `fleet`.

    Args:
        networks: The networks.
        chunks: The pieces.
        survey: Of a network with the most calls, for the memory that passes hold.
        limit: Bytes that all passes may hold; one piece may go beyond.
        joined: The layers at whose additions passes may have to pause.
    """

    def __init__(
            self, networks: Sequence[nn.Module], chunks: Sequence[Chunk], survey: Survey, limit: float,
            joined: Collection[str]):
        self.networks, self.chunks, self.joined = networks, chunks, joined
        self.device = next(networks[0].parameters()).device
        self._room = {}  # call to bytes that an image holds there or later
        most = 0
        for call, held in zip(reversed(survey.calls), reversed(survey.held), strict=True):
            self._room[call] = most = max(most, held)
        self._limit = limit / len(networks)
        self._ships: list[Ship] = []

    def at(self, layer: str, call: int = 0) -> list[Ship]:
        """The pieces that take part at a call of a layer; they are still on their way there."""
        room = self._limit / max(self._room.get((layer, call), 0), 1)
        images = self.images
        for index in range(len(self._ships), len(self.chunks)):
            chunk = self.chunks[index]
            images += len(chunk.held)
            if self._ships and images > room:
                break
            batch = chunk.on(self.device)
            walks = [Walk(lambda run=chunk.forward, network=network, batch=batch: run(network, batch),  # type: ignore
                          self.joined) for network in self.networks]
            self._ships.append(Ship(index, chunk.held.to(self.device), walks))
        return self._ships

    @property
    def images(self) -> int:
        """Images in the pieces that are on their way."""
        return sum(len(ship.held) for ship in self._ships)

    def restart(self) -> None:
        """Give all passes up; the next start from the beginning."""
        for ship in self._ships:
            for walk in ship.walks:
                walk.close()
        self._ships = []


def survey(network: nn.Module, names: Sequence[str], chunks: Sequence[Chunk]) -> Survey:
    """What a pass of a network in eval mode meets at the named layers.

    Raises:
        LeanError: A network in half precision, in which sums over images would overflow.
    """
    check_float32(network, 'calibrate')
    sample = chunks[0].sample()
    count = len(sample.held)
    return Survey().run(network, names, lambda: sample.run(network), count, sample.bytes // count)


@contextmanager
def fleet(
        networks: Sequence[nn.Module], names: Sequence[str], chunks: Sequence[Chunk], survey: Survey, limit: float,
        joined: Collection[str] = (),
) -> Iterator[Fleet]:
    """A fleet whose passes can pause at the named layers; they all end with the block."""
    ships = Fleet(networks, chunks, survey, limit, joined)
    with hooked(names, *networks):
        try:
            yield ships
        finally:
            ships.restart()
