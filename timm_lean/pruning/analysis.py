"""How the criteria differ on a model: pruned share against threshold, overlap, complex eigenvalues.

Paper: https://arxiv.org/abs/2102.02804, the analyses of its section 4.
"""
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from timm_lean.errors import LeanError
from timm_lean.layers.filter_banks import check_finite, find_filter_banks
from timm_lean.layers.patterns import Patterns
from timm_lean.measure.pictures import REFERENCE, new_figure

from .spectral import CRITERIA, all_scores, below

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ['CriteriaAnalysis', 'analyze_criteria']

THRESHOLDS = tuple(10 ** (e / 4) for e in range(-24, 5))


@dataclass(frozen=True)
class CriteriaAnalysis:
    """What `analyze_criteria` computes; shares are of the kernels looked at.

    Attributes:
        threshold: The t of `layers` and `overlap`.
        thresholds: The t of `curves`.
        kernels: Number of kernels.
        curves: Criterion to the pruned share at each of `thresholds`.
        layers: Layer to (kernels, complex share, criterion to pruned share at `threshold`).
        overlap: Pair of criteria to |A and B| / |A or B| of their pruned sets (1 if both are empty).
        complex_share: Share of the square kernels larger than 1 x 1 that have a complex pair of eigenvalues.
    """
    threshold: float
    thresholds: tuple[float, ...]
    kernels: int
    curves: dict[str, list[float]]
    layers: dict[str, tuple[int, float, dict[str, float]]]
    overlap: dict[tuple[str, str], float]
    complex_share: float

    def __str__(self) -> str:
        lines = [f'{self.kernels:,} kernels, {100 * self.complex_share:.1f} % with complex eigenvalues',
                 f'pruned at t = {self.threshold:g}:']
        total = sum(n for n, *_ in self.layers.values())
        for name in CRITERIA:
            share = sum(n * shares[name] for n, _, shares in self.layers.values()) / total
            lines.append(f'  {name:21} {100 * share:6.2f} %')
        lines.append('overlap of the pruned sets (intersection / union):')
        lines.append(' ' * 22 + ''.join(f'{name[:12]:>13}' for name in CRITERIA))
        for a in CRITERIA:
            lines.append(f'{a:22}' + ''.join(f'{self.overlap[a, b]:13.3f}' for b in CRITERIA))
        return '\n'.join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The analysis as JSON data."""
        overlap = {a: {b: self.overlap[a, b] for b in CRITERIA} for a in CRITERIA}
        layers = {name: dict(kernels=n, complex=share, pruned=pruned)
                  for name, (n, share, pruned) in self.layers.items()}
        return {**asdict(replace(self, overlap={})), 'layers': layers, 'overlap': overlap}

    def tables(self) -> dict[str, list[list[Any]]]:
        """`curves`, `layers` and `overlap` as rows, the first of each its header."""
        curves = [[t, *(self.curves[c][i] for c in CRITERIA)] for i, t in enumerate(self.thresholds)]
        layers = [[layer, count, share, *(pruned[c] for c in CRITERIA)]
                  for layer, (count, share, pruned) in self.layers.items()]
        return {
            'curves': [['threshold', *CRITERIA], *curves],
            'layers': [['layer', 'kernels', 'complex', *CRITERIA], *layers],
            'overlap': [['criterion', *CRITERIA], *([a, *(self.overlap[a, b] for b in CRITERIA)] for a in CRITERIA)],
        }

    def figure(self) -> 'Figure':
        """Pruned share against threshold, per layer, and the overlap, as a picture."""
        figure, (curves, layers, overlap) = new_figure((15, 4.5), columns=3)
        for name in CRITERIA:
            curves.semilogx(self.thresholds, [100 * v for v in self.curves[name]], label=name)
            layers.plot([100 * pruned[name] for _, _, pruned in self.layers.values()], marker='.', label=name)
        curves.axvline(self.threshold, color=REFERENCE, linestyle=':')
        curves.set_xlabel('threshold t')
        curves.set_ylabel('pruned, %')
        layers.plot([100 * share for _, share, _ in self.layers.values()], 'k--', label='complex eigenvalues')
        layers.set_xlabel('layer')
        layers.set_ylabel(f'pruned at t = {self.threshold:g}, %')
        for axes in (curves, layers):
            axes.legend(fontsize=7)
        picture = overlap.imshow([[self.overlap[a, b] for b in CRITERIA] for a in CRITERIA], vmin=0, vmax=1)
        overlap.grid(visible=False)
        overlap.set_xticks(range(len(CRITERIA)), CRITERIA, rotation=90, fontsize=7)
        overlap.set_yticks(range(len(CRITERIA)), CRITERIA, fontsize=7)
        overlap.set_title('overlap of the pruned sets', fontsize=9)
        figure.colorbar(picture, ax=overlap)
        return figure


@torch.no_grad()
def analyze_criteria(
        model: nn.Module, *, threshold: float = 1e-4, include: Patterns = None, exclude: Patterns = None,
) -> CriteriaAnalysis:
    """Score every kernel of a model by the paper's eight criteria and compare what they would prune.

    Args:
        model: Any model with convolutions; kernels that are not square are left out.
        threshold: The t at which layers and overlap are reported.
        include: Shell patterns on the names of convolutions to look at; all if None.
        exclude: Patterns of those to leave out.

    Raises:
        LeanError: A negative threshold, NaN weights, or no square kernels.
    """
    if not threshold >= 0:
        raise LeanError(f'A pruning threshold must be at least 0, got {threshold!r}.')
    banks = find_filter_banks(model, include, exclude, user='The analysis of criteria')
    banks = [bank for bank in banks if bank.weight.shape[2] == bank.weight.shape[3]]
    if not banks:
        raise LeanError('The analysis of criteria needs square kernels, and the model has none.')
    check_finite(banks, 'The analysis of criteria')
    kernels = sum(bank.weight.shape[:2].numel() for bank in banks)
    counts = {c: torch.zeros(len(THRESHOLDS), dtype=torch.int64) for c in CRITERIA}
    both = torch.zeros(len(CRITERIA), len(CRITERIA), dtype=torch.float64)
    layers: dict[str, tuple[int, float, dict[str, float]]] = {}
    pairs = large = 0
    for bank in banks:
        n = bank.weight.shape[2]
        scores = {c: s.cpu() for c, s in all_scores(bank.weight).items()}
        for c in CRITERIA:
            counts[c] += torch.stack([below(scores[c], c, t, n).sum() for t in THRESHOLDS])
        masks = torch.stack([below(scores[c], c, threshold, n).flatten() for c in CRITERIA])
        wide = masks.double()
        both += wide @ wide.T
        found = _complex(bank.weight)
        pairs += found
        large += masks.shape[1] * (n > 1)
        shares = dict(zip(CRITERIA, wide.mean(1).tolist(), strict=True))
        layers[bank.name] = (masks.shape[1], found / masks.shape[1], shares)
    single = both.diagonal()
    union = single[:, None] + single - both
    overlap = torch.where(union == 0, 1.0, both / union)
    return CriteriaAnalysis(
        threshold, THRESHOLDS, kernels, {c: (counts[c].double() / kernels).tolist() for c in CRITERIA}, layers,
        {(a, b): float(overlap[i, j]) for i, a in enumerate(CRITERIA) for j, b in enumerate(CRITERIA)},
        pairs / max(large, 1))


def _complex(weight: torch.Tensor) -> int:
    """Number of kernels with a pair of complex eigenvalues."""
    n = weight.shape[2]
    if n == 1:
        return 0
    eigenvalues = torch.linalg.eigvals(weight.detach().double().flatten(0, 1).cpu())
    return int((eigenvalues.imag.abs().amax(1) > 1e-9 * eigenvalues.abs().amax(1)).sum())
