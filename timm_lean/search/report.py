"""What a search found: the chosen network in plain words, all candidates as a table, CSV and picture."""
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from timm_lean.checkpoint.files import atomic_file
from timm_lean.layers.lean_report import LeanReport
from timm_lean.measure.pictures import COLORS, REFERENCE, check_picture, new_figure, save_figure
from timm_lean.measure.tradeoff import pareto_front

from .plan import Plan
from .sizes import QUANTITIES, Sizes
from .target import show

__all__ = ['Candidate', 'CompressReport']

_AXES = {'params': ('thousand parameters', 1e3), 'macs': ('million multiply-accumulates', 1e6),
         'file': ('file, kB', 1e3), 'latency': ('ms per image', 1.)}


@dataclass(frozen=True)
class Candidate:
    """A network that was made and judged.

    Attributes:
        plan: How.
        sizes: What it costs.
        score: In per cent, see `Judge`.
        tuned: Whether it was trained further.
    """
    plan: Plan
    sizes: Sizes
    score: float
    tuned: bool = False

    def __str__(self) -> str:
        return f'{self.plan}{", fine-tuned" * self.tuned}'


@dataclass(frozen=True, kw_only=True)
class CompressReport(LeanReport):
    """What `compress` did.

    Attributes:
        targets: As they were given.
        chosen: The network that was returned.
        original: The given one.
        candidates: All that were judged, in order.
        judged_by: What the scores are.
        met: Whether the chosen one meets all targets.
        refused: Techniques that were left out, and why.
    """
    targets: tuple[str, ...]
    chosen: Candidate
    original: Candidate
    candidates: tuple[Candidate, ...]
    judged_by: str
    met: bool = True
    refused: tuple[tuple[str, str], ...] = ()

    @property
    def summary(self) -> str:
        """One line in plain words."""
        sizes, before = self.chosen.sizes, self.original.sizes
        costs = [f'{name} {show(name, before[name])} -> {show(name, sizes[name])} ({sizes[name] / before[name]:.2f}x)'
                 for name in QUANTITIES if getattr(sizes, name) is not None and getattr(before, name) is not None]
        change = self.chosen.score - self.original.score
        return (f'{self.chosen}: {", ".join(costs)}; {self.judged_by} {self.original.score:.2f} -> '
                f'{self.chosen.score:.2f} % ({change:+.2f} points)')

    @property
    def weights(self) -> str:
        """How the network is to be stored, an argument of `save_model`."""
        return 'int8' if self.chosen.plan.int8 else 'float'

    def frontier(self, quantity: str) -> list[Candidate]:
        """Candidates that no other one beats in this quantity and the score, the smallest first."""
        points = [self.original, *self.candidates]
        points = [p for p in points if getattr(p.sizes, quantity) is not None]
        return [points[i] for i in pareto_front([(p.sizes[quantity], p.score) for p in points])]

    def lines(self) -> list[str]:
        quantity = self.targets[0].partition('=')[0]
        rows = self.frontier(quantity)
        names = [name for name in QUANTITIES if getattr(self.original.sizes, name) is not None]
        lines = [f'{len(self.candidates)} candidates; those that no other beats by {quantity} and {self.judged_by}:',
                 ''.join(f'{name:>12}' for name in names) + f'{self.judged_by[:12]:>14}']
        for row in rows:
            cells = [show(name, row.sizes[name]) if getattr(row.sizes, name) is not None else '-' for name in names]
            mark = '  <- chosen' if row == self.chosen else ''
            lines.append(''.join(f'{cell:>12}' for cell in cells) + f'{row.score:>12.2f} %  {row}{mark}')
        lines += [f'{name} was left out: {why}' for name, why in self.refused]
        if self.chosen.plan.share < 1 and any(target.startswith(('macs', 'latency')) for target in self.targets):
            lines.append('MACs and latency are those of the cheaper form, the network as it is or folded: '
                         'timm-lean export --fold')
        return [*lines, self.summary]

    def write_csv(self, path: str | Path) -> None:
        """All candidates, one per row, the original first."""
        with atomic_file(path) as temporary, open(temporary, 'w', newline='') as f:
            writer = csv.writer(f)
            writer.writerow([*QUANTITIES, 'score', 'blocks', 'channels', 'share', 'kernels', 'int8', 'tuned',
                             'chosen'])
            for each in (self.original, *self.candidates):
                plan = each.plan
                writer.writerow([*(getattr(each.sizes, name) for name in QUANTITIES), round(each.score, 4),
                                 ' '.join(plan.blocks), plan.channels, plan.share, plan.kernels, plan.int8, each.tuned,
                                 each == self.chosen])

    def plot(self, path: str | Path) -> None:
        """Score against each target's quantity: a point per candidate, the frontier, the original, the choice."""
        check_picture(path)
        quantities = [target.partition('=')[0] for target in self.targets]
        figure, all_axes = new_figure((1.5 + 5.5 * len(quantities), 4.5), columns=len(quantities))
        for axes, quantity in zip(all_axes, quantities, strict=True):
            title, unit = _AXES[quantity]

            def point(each: Candidate, quantity: str = quantity, unit: float = unit) -> tuple[float, float]:
                return each.sizes[quantity] / unit, each.score

            for index, (name, points) in enumerate(_by_kind(self.candidates).items()):
                xs, ys = zip(*map(point, points), strict=True)
                axes.scatter(xs, ys, s=28, color=COLORS[index % len(COLORS)],
                             marker='oDsv^P*'[index // len(COLORS) % 7], label=name, zorder=3)
            xs, ys = zip(*map(point, self.frontier(quantity)), strict=True)
            axes.plot(xs, ys, color='0.6', linewidth=1, zorder=1)
            for each, style in ((self.original, dict(marker='X', s=70, color='black', label='original')),
                                (self.chosen, dict(s=160, facecolors='none', edgecolors='black', label='chosen'))):
                x, y = point(each)
                axes.scatter([x], [y], zorder=4, **style)  # type: ignore[arg-type]
            axes.axhline(self.original.score, color=REFERENCE, linewidth=0.8, linestyle=':')
            axes.set_xlim(left=0)
            axes.set_xlabel(title)
            axes.set_ylabel(f'{self.judged_by} (%)')
            axes.legend(fontsize=7)
        save_figure(figure, path)


def _by_kind(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """Candidates by the techniques they use."""
    kinds: dict[str, list[Candidate]] = {}
    for each in candidates:
        plan = each.plan
        used = [name for name, on in (('blocks', plan.blocks), ('channels', plan.channels), ('share', plan.share < 1),
                                      ('kernels', plan.kernels), ('int8', plan.int8)) if on]
        kinds.setdefault(' + '.join(used) + ', tuned' * each.tuned, []).append(each)
    return kinds
