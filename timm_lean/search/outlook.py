"""What a search can reach and what it would do, told before it costs any time."""
from dataclasses import dataclass
from typing import Any

from .plan import Plan
from .sizes import Sizes
from .target import Target, show

__all__ = ['Outlook']


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Printable, and plain data by `to_dict()`.

    Attributes:
        targets: What is wished for.
        original: What the network costs.
        smallest: For each technique alone, and all together, the smallest share of the original's that it can make of
            each targeted quantity.
        refused: Techniques that are left out, and why.
        networks: Those that are tried first, in order; none if the original meets the targets.
        most_mixes: So many mixes of techniques are tried after them at most.
        patience: After so many mixes without a better one the search ends.
        minutes: Time for all networks together.
        judged_by: What the scores are.
        calibration_images: Images that each network is calibrated by.
        held_out_images: Those of them that judge instead; 0 with a measure of the user's.
        max_drop: Points that may be lost, if that was said.
        nearest: Whether the nearest network will do where none meets the targets.
        finetuned: So many of the best are trained further.
    """
    targets: tuple[Target, ...]
    original: Sizes
    smallest: dict[str, dict[str, float]]
    refused: dict[str, str]
    networks: tuple[Plan, ...]
    most_mixes: int
    patience: int
    minutes: float
    judged_by: str
    calibration_images: int
    held_out_images: int
    max_drop: float | None
    nearest: bool
    finetuned: int

    @property
    def in_reach(self) -> bool:
        """Whether the original, a technique alone or all together meet the targets, without regard to accuracy."""
        return any(all(shares[t.quantity] * self.original[t.quantity] <= t.limit(self.original) for t in self.targets)
                   for shares in (dict.fromkeys((t.quantity for t in self.targets), 1.), *self.smallest.values()))

    def to_dict(self) -> dict[str, Any]:
        """The outlook as JSON data."""
        return {
            **vars(self), 'targets': list(map(str, self.targets)), 'in_reach': self.in_reach,
            'original': {name: value for name, value in vars(self.original).items() if value is not None},
            'networks': [plan.to_dict() for plan in self.networks]}

    def __str__(self) -> str:
        return '\n'.join([*self._reach(), '', *self._search()])

    def _reach(self) -> list[str]:
        lines = ['Wanted: ' + ', '.join(
            f'{t.quantity} of at most {show(t.quantity, t.limit(self.original))}, now '
            f'{show(t.quantity, self.original[t.quantity])}' for t in self.targets)]
        lines.append('Smallest shares of the original, without regard to accuracy:')
        lines += [f'  {name}: ' + ', '.join(f'{quantity} {share:.3f}' for quantity, share in shares.items())
                  for name, shares in self.smallest.items()]
        lines += [f'  {name} is left out: {why}' for name, why in self.refused.items()]
        return lines if self.in_reach else [*lines, 'That is out of reach.']

    def _search(self) -> list[str]:
        if not self.networks:
            return ['Nothing would be tried' + ': the network meets that as it is.' * self.in_reach]
        lines = [f'Networks that would be tried, in this order, until {self.minutes:g} minutes are over (no technique '
                 'has a share of its own):']
        lines += [f'  {number}. {plan}' for number, plan in enumerate(self.networks, 1)]
        if len(self.smallest) > 1:
            lines.append(f'  then mixes of techniques, those first that promise the smallest loss: {self.most_mixes} '
                         f'at most, or until {self.patience} in a row are no better')
        lines.append(f'Each is calibrated by {self.calibration_images:,} images and judged by '
                     + (f'its {self.judged_by} with the original on {self.held_out_images:,} others.'
                        if self.held_out_images else f'its {self.judged_by}.'))
        if self.finetuned:
            lines.append(f'The best {self.finetuned} that meet the targets are trained further.')
        drop = '' if self.max_drop is None else f' and loses at most {self.max_drop:g} points'
        lines.append(f'Taken is the best that meets the targets{drop}; where there is none, '
                     + ('the one that comes nearest.' if self.nearest else 'nothing.'))
        return lines
