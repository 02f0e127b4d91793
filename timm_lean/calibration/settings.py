"""What to calibrate with, and how: the images and the options of `calibrate`."""
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn

from timm_lean.errors import LeanError

__all__ = ['Calibration']


@dataclass(frozen=True)
class Calibration:
    """Images with options, for everything that takes `calibration=`; images alone stand for the defaults.

    Attributes:
        batches: A few hundred images as batches `[B, C, H, W]`, or tuples that start with them; with `forward`,
            whatever that takes. A quarter is held out. A sequence is asked for its batches again and again, so it may
            prepare them then, always in the same way; of anything else they are kept.
        forward: `(network, batch)` runs a network that is not called with images alone, a detector say, and returns
            its outputs, tensors in any nesting; it must not change the batch. Batches are then not looked into: every
            fourth is held out as a whole.
        ridge: Penalty on a change of weights, relative to the mean square of a layer's inputs.
        rounds: Rounds of fitting shared bases jointly and then all layers front to back. Without shared bases one is
            enough, and one is made.
        positions: Positions of each image that a layer is fitted to, at most; fewer where they are more than enough.
        biases_only: Change biases alone, and means of batch norms in their place: where weights have to stay on a
            grid, as those stored in int8 do.
        reestimate_bn: Measure the batch norms' statistics anew at the end, if that lowers the output error.
        memory_limit: Bytes that activations may take, and that outputs for held-out images may.
        progress: Show a progress bar.

    Raises:
        LeanError: An option that cannot be meant.
    """
    batches: Iterable[Any]
    forward: Callable[[nn.Module, Any], Any] | None = None
    ridge: float = 1e-3
    rounds: int = 2
    positions: int = 64
    biases_only: bool = False
    reestimate_bn: bool = True
    memory_limit: float = 1.4e9
    progress: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.batches, torch.Tensor):
            raise LeanError(f'Calibration needs an iterable of image batches, got one tensor '
                            f'{list(self.batches.shape)}: give [images].')
        if not isinstance(self.batches, Iterable):
            raise LeanError('Calibration needs an iterable of image batches, a loader say, got '
                            f'{type(self.batches).__name__}.')
        for name in ('rounds', 'positions'):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise LeanError(f'{name} of calibration must be a whole number of at least 1, got {value!r}.')
        for name, least in (('ridge', 0), ('memory_limit', 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
                raise LeanError(f'{name} of calibration must be a number of at least {least}, got {value!r}.')

    @classmethod
    def of(cls, calibration: 'Calibration | Iterable[Any]', **options: Any) -> 'Calibration':
        """Images and options as one; options given here come before those that are there."""
        if isinstance(calibration, Calibration):
            return replace(calibration, **options)
        return cls(calibration, **options)

    def hold(self) -> 'Calibration':
        """The same with its batches in a sequence, to be gone through more than once."""
        return self if isinstance(self.batches, Sequence) else replace(self, batches=list(self.batches))
