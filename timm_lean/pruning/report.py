"""What a pruning run did, layer by layer: a table and a picture."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from timm_lean.layers.filter_banks import FilterBank
from timm_lean.layers.lean_report import LeanReport
from timm_lean.measure import count_params
from timm_lean.measure.pictures import REFERENCE, layer_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['KernelReport', 'LayerReport', 'live_kernels', 'report_banks']


@dataclass(frozen=True)
class LayerReport:
    """One filter bank.

    Attributes:
        name: Its module.
        shape: Of the weight, `[N, C / groups, kh, kw]`.
        pruned: Kernels that are zero.
        dead_filters: Filters all of whose kernels are zero.
        kept_by_bound: Kernels that were to be pruned and are kept by `min_keep`.
    """
    name: str
    shape: tuple[int, ...]
    pruned: int
    dead_filters: int
    kept_by_bound: int = 0

    @property
    def kernels(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True, kw_only=True)
class KernelReport(LeanReport):
    """All filter banks of a model; printed, a table."""
    layers: tuple[LayerReport, ...]

    @property
    def kernels(self) -> int:
        return sum(layer.kernels for layer in self.layers)

    @property
    def pruned(self) -> int:
        return sum(layer.pruned for layer in self.layers)

    @property
    def share(self) -> float:
        """Pruned kernels as a share of all."""
        return self.pruned / self.kernels

    @property
    def bounded(self) -> list[str]:
        """The layers in which `min_keep` kept kernels."""
        return [layer.name for layer in self.layers if layer.kept_by_bound]

    def lines(self) -> list[str]:
        width = max(5, *(len(layer.name) for layer in self.layers))
        lines = [f'{"layer":{width}}  {"shape":>18}  {"kernels":>10}  {"pruned":>10}  {"%":>5}  dead filters']
        for layer in self.layers:
            shape = ' x '.join(map(str, layer.shape))
            lines.append(
                f'{layer.name:{width}}  {shape:>18}  {layer.kernels:>10,}  {layer.pruned:>10,}  '
                f'{100 * layer.pruned / layer.kernels:>5.1f}  {layer.dead_filters} of {layer.shape[0]}'
                + (f'  (min_keep kept {layer.kept_by_bound:,})' if layer.kept_by_bound else ''))
        dead, filters = sum(x.dead_filters for x in self.layers), sum(x.shape[0] for x in self.layers)
        lines.append(f'{"all":{width}}  {"":>18}  {self.kernels:>10,}  {self.pruned:>10,}  {100 * self.share:>5.1f}  '
                     f'{dead} of {filters}')
        return lines

    def figure(self) -> 'Figure':
        """The pruned share of every layer, as a picture."""
        figure, axes = layer_figure([layer.name for layer in self.layers])
        places = range(len(self.layers))
        axes.bar(places, [100 * layer.pruned / layer.kernels for layer in self.layers], label='kernels')
        axes.plot(places, [100 * layer.dead_filters / layer.shape[0] for layer in self.layers], 'k.',
                  label='whole filters')
        axes.axhline(100 * self.share, color=REFERENCE, linestyle='--', label='kernels, all layers')
        axes.set_ylabel('pruned, %')
        axes.set_ylim(0, 100)
        axes.legend()
        return figure


def report_banks(model: nn.Module, banks: Sequence[FilterBank], kept: dict[str, int] | None = None) -> KernelReport:
    """Count the kernels that are zero now.

    Args:
        model: The model.
        banks: The filter banks.
        kept: By name, how many kernels `min_keep` kept.
    """
    layers = []
    for bank in banks:
        live = live_kernels(bank.weight)
        layers.append(LayerReport(
            bank.name, tuple(bank.weight.shape), int((~live).sum()), int((~live.any(1)).sum()),
            (kept or {}).get(bank.name, 0)))
    params = count_params(model)
    return KernelReport(
        params=(params, params), touched=sum(bank.weight.numel() for bank in banks), layers=tuple(layers))


def live_kernels(weight: torch.Tensor) -> torch.Tensor:
    """`[N, C / groups]`, True where a kernel has an entry that is not zero."""
    return (weight.detach() != 0).flatten(2).any(2)
