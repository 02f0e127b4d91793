"""What a network costs: parameters, MACs, bytes of its file, milliseconds."""
import copy
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn as nn

from timm_lean.layers.shared_basis import SharedBasisConv2d
from timm_lean.measure import count_macs, count_params, measure_latency
from timm_lean.sharing import fold

from .subject import Subject

__all__ = ['QUANTITIES', 'Sizes', 'measure_sizes']

QUANTITIES = ('params', 'macs', 'file', 'latency')


@dataclass(frozen=True)
class Sizes:
    """What a network costs; None where it was not measured.

    Attributes:
        params: Parameters, shared ones counted once.
        macs: Multiply-accumulates of one image, of a network with shared bases in its cheaper form: as it is or folded.
        file: Bytes of its checkpoint.
        latency: Milliseconds of one image, in the same form.
    """
    params: int | None = None
    macs: int | None = None
    file: int | None = None
    latency: float | None = None

    def __getitem__(self, quantity: str) -> float:
        value = getattr(self, quantity)
        assert value is not None, quantity
        return value

    def hold(self, quantities: Collection[str]) -> bool:
        """Whether all these were measured."""
        return all(getattr(self, quantity) is not None for quantity in quantities)


def measure_sizes(
        model: nn.Module,
        subject: Subject,
        quantities: Collection[str] = QUANTITIES,
        original: tuple[nn.Module, float] | None = None,
        weights: str = 'float',
) -> Sizes:
    """Measure a network.

    Args:
        model: The network, in eval mode.
        subject: What it is; its image is measured with.
        quantities: Those to measure.
        original: Another network and the milliseconds that count for it: the latency is given relative to it, measured
            in turn, so that a machine that became slower or faster meanwhile does not matter.
        weights: How the file stores them, see `save_model`.
    """
    values: dict[str, Any] = {}
    if 'params' in quantities:
        values['params'] = count_params(model)
    if 'file' in quantities:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / 'model.safetensors'
            subject.save(model, path, weights)
            values['file'] = path.stat().st_size
    if {'macs', 'latency'} & set(quantities):
        form, values['macs'] = _cheaper_form(model, subject)
        if 'latency' in quantities:
            values['latency'] = _latency(copy.deepcopy(form), subject, original)
    return Sizes(**values)


def _latency(model: nn.Module, subject: Subject, original: tuple[nn.Module, float] | None) -> float:
    x, model = subject.x, subject.timed(model)
    if original is None:
        return 1000 * measure_latency([model], [x.shape], x.device)[0].median
    anchor, ours = measure_latency([subject.timed(original[0]), model], [x.shape, x.shape], x.device)
    return original[1] * ours.ratio(anchor)


def _cheaper_form(model: nn.Module, subject: Subject) -> tuple[nn.Module, int]:
    """The network as it is or folded, whichever has fewer multiply-accumulates, and how many."""
    macs = count_macs(subject.counted(model), subject.x.shape)
    if any(isinstance(m, SharedBasisConv2d) for m in model.modules()):
        folded = subject.apply(fold, model)
        folded_macs = count_macs(subject.counted(folded), subject.x.shape)
        if folded_macs < macs:
            return folded, folded_macs
    return model, macs
