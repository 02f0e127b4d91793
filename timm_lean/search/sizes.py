"""What a network costs: parameters, MACs, bytes of its file, milliseconds."""
import copy
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from timm_lean.checkpoint.format import save_model
from timm_lean.layers.shared_basis import SharedBasisConv2d
from timm_lean.measure import count_macs, count_params, measure_latency
from timm_lean.sharing import fold

__all__ = ['QUANTITIES', 'Sizes', 'measure_sizes']

QUANTITIES = ('params', 'macs', 'file', 'latency')


@dataclass(frozen=True)
class Sizes:
    """What a network costs.

    Attributes:
        params: Parameters, shared ones counted once.
        macs: Multiply-accumulates of one image, of a network with shared bases in its cheaper form: as it is or folded.
        file: Bytes of its checkpoint.
        latency: Milliseconds of one image in the same form, None where it was not measured.
    """
    params: int
    macs: int
    file: int
    latency: float | None = None

    def __getitem__(self, quantity: str) -> float:
        value = getattr(self, quantity)
        assert value is not None, quantity
        return value


def measure_sizes(
        model: nn.Module,
        x: torch.Tensor,
        quantities: Collection[str] = QUANTITIES,
        original: tuple[nn.Module, float] | None = None,
) -> Sizes:
    """Measure a network.

    Args:
        model: The network, in eval mode.
        x: One image `[1, C, H, W]`, where the network is.
        quantities: Latency is measured only if it is among them; the rest always.
        original: Another network and the milliseconds that count for it: the latency is given relative to it, measured
            in turn, so that a machine that became slower or faster meanwhile does not matter.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'model.safetensors'
        save_model(model, path)
        size = path.stat().st_size
    form, macs = _cheaper_form(model, x)
    latency = None
    if 'latency' in quantities:
        if original is None:
            latency = 1000 * measure_latency([copy.deepcopy(form)], [x.shape], x.device)[0].median
        else:
            anchor, ours = measure_latency([original[0], copy.deepcopy(form)], [x.shape, x.shape], x.device)
            latency = original[1] * ours.ratio(anchor)
    return Sizes(count_params(model), macs, size, latency)


def _cheaper_form(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, int]:
    """The network as it is or folded, whichever has fewer multiply-accumulates, and how many."""
    macs = count_macs(model, x.shape)
    if any(isinstance(m, SharedBasisConv2d) for m in model.modules()):
        folded = fold(model)
        folded_macs = count_macs(folded, x.shape)
        if folded_macs < macs:
            return folded, folded_macs
    return model, macs
