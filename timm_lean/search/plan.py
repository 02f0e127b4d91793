"""A way to compress a network: how much of each technique, in the order that works."""
import logging
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.nn as nn

from timm_lean.export.rounding import round_weights
from timm_lean.pruning import prune_channels, prune_kernels, remove_blocks
from timm_lean.sharing import share

from .subject import Subject

__all__ = ['HELPS', 'TECHNIQUES', 'Plan']

TECHNIQUES = ('blocks', 'channels', 'share', 'kernels', 'int8')
# What a technique can make smaller. Zero kernels are still computed with and still parameters, only the file leaves
# them out. A shared basis is multiplied out before a k x k convolution, so that its time stays; 1 x 1 convolutions and
# linear layers get cheaper (`Space` measures which it is).
HELPS = {
    'blocks': ('params', 'macs', 'file', 'latency'),
    'channels': ('params', 'macs', 'file', 'latency'),
    'share': ('params', 'macs', 'file', 'latency'),
    'kernels': ('file',),
    'int8': ('file',),
}
_ROUND_TO = 4
_DIGITS = 3  # of an amount: what a search tries stays the same from run to run


@dataclass(frozen=True)
class Plan:
    """How much of each technique.

    Attributes:
        blocks: Residual blocks to remove, in this order.
        channels: Share of every layer's channels to remove.
        share: Parameters after conversion to shared bases, as a share of those before; 1 for none.
        kernels: Share of the kernels to prune.
        int8: Store weights as int8.
    """
    blocks: tuple[str, ...] = ()
    channels: float = 0.
    share: float = 1.
    kernels: float = 0.
    int8: bool = False

    def make(self, model: nn.Module, subject: Subject, images: Iterable[Any] | None = None) -> nn.Module:
        """The compressed network.

        Args:
            model: The original, not changed.
            subject: What it is, see `subject.Subject`.
            images: Batches to calibrate with after each technique; without, only the structure is of use.

        Raises:
            LeanError: A technique refuses.
        """
        # blocks are found by what a network computes, channels by its layers' own filters, kernels are those of bases
        with _quiet():
            if self.blocks:
                model = subject.apply(remove_blocks, model, blocks=self.blocks, calibration=images)
            if self.channels:
                model = subject.apply(
                    prune_channels, model, pruning_ratio=self.channels, round_to=_ROUND_TO, calibration=images)
            if self.share < 1:
                model = subject.apply(share, model, params=self.share, calibration=images)
            if self.kernels:
                model = subject.apply(prune_kernels, model, amount=self.kernels, calibration=images)
            return self.stored(model, subject, images)

    def stored(self, model: nn.Module, subject: Subject, images: Iterable[Any] | None = None) -> nn.Module:
        """The network as it will be read from its file."""
        return subject.apply(round_weights, model, calibration=images) if self.int8 else model

    def rounded(self) -> 'Plan':
        """The same with amounts of few digits."""
        return replace(self, **{name: round(getattr(self, name), _DIGITS) for name in ('channels', 'share', 'kernels')})

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), 'blocks': list(self.blocks)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> 'Plan':
        return cls(**{**values, 'blocks': tuple(values['blocks'])})

    def __str__(self) -> str:
        parts = []
        if self.blocks:
            parts.append(f'{len(self.blocks)} block{"s" * (len(self.blocks) > 1)} removed ({", ".join(self.blocks)})')
        if self.channels:
            parts.append(f'{100 * self.channels:.3g} % of the channels removed')
        if self.share < 1:
            parts.append(f'shared bases with {100 * self.share:.3g} % of the parameters')
        if self.kernels:
            parts.append(f'{100 * self.kernels:.3g} % of the kernels pruned')
        if self.int8:
            parts.append('weights stored as int8')
        return ', '.join(parts) or 'as it is'


@contextmanager
def _quiet() -> Any:
    """Without warnings that a technique can do little here or stopped early: the search sees that by itself."""
    logger = logging.getLogger('timm_lean')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
