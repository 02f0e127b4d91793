"""How good a candidate is: by the user's own measure, or by how far it says what the original says."""
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn as nn

from timm_lean.errors import LeanError

from .subject import Subject

__all__ = ['Judge', 'split_images']

_HELD_OUT = 4  # every fourth batch, or image of a single batch, judges


class Judge:
    """Scores in per cent, higher is better.

    Args:
        subject: The network before, and how to run it.
        evaluate: Accuracy of a network; if None, a network is judged by `images`.
        images: Batches `[B, C, H, W]` that nothing is fitted to: the share of them on which a classifier's first choice
            is the original's; for other networks 100 times (1 - relative error of the output).
    """

    def __init__(
            self, subject: Subject, evaluate: Callable[[nn.Module], float] | None, images: list[torch.Tensor]):
        self._subject = subject
        self._evaluate = evaluate
        self._images = images
        self._truth = [] if evaluate else [subject.outputs(subject.model, x) for x in images]
        self.classifies = not evaluate and all(
            len(leaves) == 1 and leaves[0].ndim == 2 and leaves[0].shape[1] > 1 for leaves in self._truth)
        self.reference = self(subject.model)

    @property
    def name(self) -> str:
        """What the scores are."""
        if self._evaluate:
            return self._subject.accuracy
        return 'agreement' if self.classifies else 'likeness of the output'

    @property
    def says(self) -> str:
        """What the original scores: two measures, or images to judge by, that differ tell it differently."""
        return f'{self.name} {self.reference:.4f}'

    def __call__(self, model: nn.Module) -> float:
        if self._evaluate:
            score = self._evaluate(model)
            if isinstance(score, bool) or not isinstance(score, (int, float)) or not -1e9 < score < 1e9:
                raise LeanError(f'evaluate(model) must give a number, higher is better, got {score!r}.')
            return float(score)
        same = total = 0.
        for x, truth in zip(self._images, self._truth, strict=True):
            for a, b in zip(self._subject.outputs(model, x), truth, strict=True):
                if self.classifies:
                    same += float((a.argmax(1) == b.argmax(1)).sum())
                    total += len(a)
                else:
                    same += float(b.square().sum() - (a - b).square().sum())
                    total += float(b.square().sum())
        return 100 * same / max(total, 1e-30)


def split_images(batches: Iterable[Any], judging: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Take the images of a loader, whose labels are not looked at: those to calibrate with and those to judge by.

    Args:
        batches: Images `[B, C, H, W]`, or tuples that start with them.
        judging: Whether any are to judge by; a quarter then.
    """
    if isinstance(batches, torch.Tensor):
        raise LeanError(f'Compression needs an iterable of image batches, got one tensor {list(batches.shape)}: give '
                        '[images].')
    images = []
    for batch in batches:
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, torch.Tensor) or x.ndim != 4 or not x.is_floating_point():
            raise LeanError('Compression needs batches of images [B, C, H, W] as float tensors, or tuples that start '
                            f'with them, got {type(x).__name__}.')
        images.append(x)
    if not images:
        raise LeanError('Compression got no images.')
    if not judging:
        return images, []
    if len(images) < _HELD_OUT:
        images = [piece for x in images for piece in x.split(max(len(x) // _HELD_OUT, 1))]
    held = images[_HELD_OUT - 1::_HELD_OUT]
    if not held:
        raise LeanError(f'Compression needs at least {_HELD_OUT} images where a quarter of them judges (without '
                        f'evaluate=), got {sum(map(len, images))}.')
    return [x for i, x in enumerate(images) if i % _HELD_OUT != _HELD_OUT - 1], held
