"""A detector as `timm_lean.search` sees what it compresses: see `search/subject.py`, whose methods these are.

Multiply-accumulates and milliseconds are of an image of the config's test size, as `timm-lean info` gives them.
"""
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from timm_lean.errors import LeanError
from timm_lean.pruning import prune_channels, prune_kernels, rank_blocks

from .detector import write_detector
from .on_images import on_images, runnable_part
from .report import OnImages, test_size
from .verbs import lean_detector

__all__ = ['DetectorSubject']


class DetectorSubject:
    """A detector that is to be compressed.

    Args:
        model: The detector with `cfg` and `dataset_meta`, in eval mode.
        images: Batches `[B, 3, H, W]` as its preprocessor hands them on.

    Raises:
        LeanError: It has no config.
    """
    accuracy = 'AP'
    ranking_images = 8  # they are large

    def __init__(self, model: nn.Module, images: Sequence[torch.Tensor]):
        if getattr(model, 'cfg', None) is None or getattr(model, 'dataset_meta', None) is None:
            raise LeanError(f'This {type(model).__name__} does not know its config, so it could not be saved. Open it '
                            'by timm_lean.mmdet.open_detector(FILE, CONFIG).')
        self.model: Any = model
        device = next(model.parameters()).device
        side = test_size(self.model.cfg)
        self.x = torch.zeros(1, 3, side, side, device=device)
        self._part = runnable_part(model, images[0][:1].to(device))

    def apply(self, verb: Callable[..., nn.Module], model: nn.Module, **options: Any) -> nn.Module:
        if verb is prune_kernels:  # heads start with far smaller weights: one threshold for all would empty them
            options.setdefault('scope', 'layer')
        if verb is prune_channels and options.get('calibration') is not None:
            options.setdefault('criterion', 'output')
        return lean_detector(model, verb, **options)

    def rank_blocks(self, images: torch.Tensor) -> list[str]:
        with on_images(self.model, self._part):
            return rank_blocks(self.model, images)

    def rank_channels(self) -> None:
        """Nothing: each layer loses the same share, chosen when it is pruned."""

    @torch.no_grad()
    def outputs(self, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of the heads, before boxes are selected."""
        with on_images(model.eval(), self._part):
            return [tensor.float() for tensor in model(x.to(self.x.device))]

    def counted(self, model: nn.Module) -> nn.Module:
        return OnImages(model, 'tensor')

    def timed(self, model: nn.Module) -> nn.Module:
        """A whole prediction, boxes selected."""
        return OnImages(model, 'predict')

    def structure(self) -> str:
        steps = getattr(self.model, 'lean_steps', [])
        return json.dumps([self.model.cfg.to_dict().get('model'), steps], sort_keys=True, default=str)

    def save(self, model: nn.Module, path: Path, weights: str) -> None:
        write_detector(model, path, weights=weights)
