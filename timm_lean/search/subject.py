"""What a search has to know of the kind of network it is about: the seam between `compress` and the toolkits.

A search makes candidates by the package's verbs, measures, judges and stores them. How each of that is done with a
classification network of timm is `Network`; with a detector of MMDetection it is `timm_lean.mmdet.subject`, which is
imported only for one.
"""
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from timm_lean.calibration import output_scores
from timm_lean.checkpoint.format import save_model
from timm_lean.checkpoint.recipe import recipe_of
from timm_lean.pruning import prune_channels, rank_blocks

__all__ = ['Network', 'Subject', 'subject_of']


class Subject(Protocol):
    """A network that is to be compressed, and what can be done with it and with its candidates.

    Attributes:
        model: The original, in eval mode.
        x: `[1, C, H, W]` on its device: an image of the size that costs are measured at.
        accuracy: What the user's measure is called.
        ranking_images: So many images rank the blocks.
    """
    model: nn.Module
    x: torch.Tensor
    accuracy: str
    ranking_images: int

    def apply(self, verb: Callable[..., nn.Module], model: nn.Module, **options: Any) -> nn.Module:
        """`verb(model, **options)`: a new network."""

    def rank_blocks(self, images: torch.Tensor) -> list[str]:
        """See `pruning.rank_blocks`."""

    def rank_channels(self) -> None:
        """Look at what channels do for its images, before `apply` prunes any; the same go from then on."""

    def outputs(self, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        """What a network says of images `[B, C, H, W]`."""

    def counted(self, model: nn.Module) -> nn.Module:
        """The function of images whose multiply-accumulates count."""

    def timed(self, model: nn.Module) -> nn.Module:
        """The function of images whose time counts."""

    def structure(self) -> str:
        """A text that two networks of one structure have in common."""

    def save(self, model: nn.Module, path: Path, weights: str) -> None:
        """Write a network's file; `weights` as in `save_model`."""


class Network:
    """A classification network of timm, or any other that its verbs take.

    Args:
        model: The original, in eval mode.
        images: Batches of images `[B, C, H, W]`.
    """
    accuracy = 'accuracy'
    ranking_images = 64

    def __init__(self, model: nn.Module, images: Sequence[torch.Tensor]):
        self.model = model
        self.images = images
        self.x = images[0][:1].to(next(model.parameters()).device)
        self._channels: dict[str, Any] = {}  # how they are chosen

    def apply(self, verb: Callable[..., nn.Module], model: nn.Module, **options: Any) -> nn.Module:
        if verb is prune_channels:
            options = {**self._channels, **options}
        if 'example_inputs' in inspect.signature(verb).parameters:
            options['example_inputs'] = self.x
        return verb(model, **options)

    def rank_blocks(self, images: torch.Tensor) -> list[str]:
        return rank_blocks(self.model, images)

    def rank_channels(self) -> None:
        # of all layers together: those that do little lose many, which keeps far more than the same share of each; by
        # all images: of 64 the covariances of wide layers are poor
        scores = output_scores(self.model, None, self.images)
        layers = sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in self.model.modules())
        if 2 * len(scores) > layers:  # not where weights are standardized, whose layers have no scores
            self._channels = {'criterion': 'output', 'scores': scores, 'global_pruning': True}

    @torch.no_grad()
    def outputs(self, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        leaves = tree_leaves(model.eval()(x.to(self.x.device)))
        return [leaf.float() for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def counted(self, model: nn.Module) -> nn.Module:
        return model

    def timed(self, model: nn.Module) -> nn.Module:
        return model

    def structure(self) -> str:
        return json.dumps(vars(recipe_of(self.model)), sort_keys=True, default=str)

    def save(self, model: nn.Module, path: Path, weights: str) -> None:
        save_model(model, path, weights=weights)


def subject_of(model: nn.Module, images: Sequence[torch.Tensor]) -> Subject:
    """The kind of a network; MMDetection is not imported to tell.

    Args:
        model: The original, in eval mode.
        images: Batches of images `[B, C, H, W]`.

    Raises:
        LeanError: A detector that does not know its config.
    """
    if any(c.__name__ == 'BaseDetector' and c.__module__.startswith('mmdet.') for c in type(model).__mro__):
        from timm_lean.mmdet.subject import DetectorSubject
        return DetectorSubject(model, images)
    return Network(model, images)
