"""How far a network's outputs for the held-out images are from the original's: what calibration is judged by."""
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_leaves

from timm_lean.errors import LeanError

from .images import Chunk, load_chunks
from .memory import memory_told
from .moments import all_reduce
from .settings import Calibration
from .walk import evaluation

__all__ = ['HeldOutputs', 'output_errors']


class HeldOutputs:
    """The original's outputs for the held-out images, as many as there is room for.

    Args:
        original: The network, in eval mode.
        chunks: The images.
        limit: Bytes that the outputs may take; those of one piece may take more.

    Attributes:
        images: How many images they are of.

    Raises:
        LeanError: The network does not take them.
    """

    def __init__(self, original: nn.Module, chunks: Sequence[Chunk], limit: float = float('inf')):
        self.parts: list[Chunk] = []
        self.truth: list[list[torch.Tensor]] = []
        for chunk in chunks:
            if (part := chunk.part(held=True)) is not None:
                outputs = _outputs(original, part)
                limit -= sum(tensor.nbytes for tensor in outputs)
                if self.parts and limit < 0:
                    break
                self.parts.append(part)
                self.truth.append(outputs)
        self.images = sum(len(part.held) for part in self.parts)

    def error(self, network: nn.Module) -> float:
        """Relative error of a network in eval mode; of several outputs the root of the mean square."""
        device = next(network.parameters()).device
        sums = torch.zeros(2, max(map(len, self.truth), default=1), dtype=torch.float64, device=device)
        for part, truth in zip(self.parts, self.truth, strict=True):
            outputs = _outputs(network, part)
            if [a.shape for a in outputs] != [b.shape for b in truth]:
                raise LeanError('The outputs of the two networks for the same images differ in number or shape: the '
                                'original is another network, or forward= chooses boxes, where it must return all.')
            for index, (a, b) in enumerate(zip(outputs, truth, strict=True)):
                sums[:, index] += torch.stack([(a.double() - b).square().sum(), b.double().square().sum()])
        all_reduce([sums])
        return float((sums[0] / sums[1].clamp_min(1e-30)).mean().sqrt())


def _outputs(network: nn.Module, part: Chunk) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(part.run(network))
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


@torch.no_grad()
def output_errors(
        networks: Sequence[nn.Module], original: nn.Module, batches: Calibration | Iterable[Any]) -> list[float]:
    """Relative errors of the outputs of networks, in eval mode, on the images that `calibrate` holds out.

    Args:
        networks: Compressed networks.
        original: The network that they were made from.
        batches: As `calibrate` takes them.
    """
    setting = Calibration.of(batches)
    with memory_told(setting.memory_limit), evaluation(original, *networks):
        held = HeldOutputs(original, load_chunks(setting), setting.memory_limit)
        return [held.error(network) for network in networks]
