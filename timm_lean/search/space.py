"""The plans that a network allows, from nothing at amount 0 to as much as is sensible at amount 1, and what they cost.

Sizes hang on the structure alone, so they are known without calibrating: a search first finds how much of a mix of
techniques meets a target, and only then spends its time on that one network.
"""
import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn as nn

from timm_lean.errors import LeanError
from timm_lean.sharing import shareable_range

from .plan import HELPS, Plan
from .sizes import Sizes, measure_sizes
from .subject import Subject
from .target import Target

__all__ = ['Space', 'scaled']

_MOST_CHANNELS = 0.8
_MOST_KERNELS = 0.95
_MOST_BLOCKS = 0.7  # of those that can go
_ALWAYS = ('params', 'macs', 'file')  # of candidates; structures are measured by what is targeted
_STEPS = 8  # into an interval of amounts
_EDGE = 0.15  # of the interval that each step takes off at least
_LEAST = 2. ** -7
_HARDLY = 0.97  # of a quantity is left by half of a technique: it is of no use
_AIM, _CLOSE = 0.995, 0.98  # of a limit: calibration may still change a size a little; and near enough


class Space:
    """Plans and sizes of one network.

    Args:
        subject: The original, and what can be done with it.
        images: Some images `[N, C, H, W]` to rank blocks by.
        techniques: Those of `plan.TECHNIQUES` to use.
        targets: What is to become smaller; techniques that cannot help any of them are left out.

    Attributes:
        original: What the network costs.
        techniques: Those that are used.
        refused: Those that are not, and why.
    """

    def __init__(
            self, subject: Subject, images: torch.Tensor, techniques: Collection[str], targets: Sequence[Target]):
        self.subject, self.model, self.targets = subject, subject.model, targets
        self.quantities = {target.quantity for target in targets}
        self._anchor = copy.deepcopy(self.model)
        self.original = measure_sizes(self.model, subject, {*_ALWAYS, *self.quantities})
        self._sizes: dict[Plan, Sizes | None] = {}
        self._floor = 1.
        self._blocks: list[str] = []
        self.refused: dict[str, str] = {}
        self.techniques: list[str] = []
        for name in HELPS:
            if name not in techniques:
                continue
            why = self._prepare(name, images)
            if why:
                self.refused[name] = why
            else:
                self.techniques.append(name)

    def _prepare(self, name: str, images: torch.Tensor) -> str:
        """Find out how far a technique goes; an empty text if it is of use."""
        if not self.quantities & set(HELPS[name]):
            return f'it does not change {" or ".join(sorted(self.quantities))}'
        try:
            if name == 'blocks':
                self._blocks = self.subject.rank_blocks(images)
            elif name == 'channels':
                self.subject.rank_channels()
            elif name == 'share':
                self._floor = shareable_range(self.model)[0]
            plan = self.plan({name: 0.5})
            new = plan.make(self.model, self.subject)
        except LeanError as e:
            return str(e)
        sizes = self._sizes[plan] = self._measure(new, plan, {*self.quantities, 'macs'})
        # what a time is worth before it is measured well: its multiply-accumulates
        costs = {'macs' if quantity == 'latency' else quantity for quantity in self.quantities}
        if name == 'share' and all(sizes[cost] > _HARDLY * self.original[cost] for cost in costs):
            return f'it hardly changes {" or ".join(sorted(self.quantities))} of this network'
        return ''

    def plan(self, amounts: Mapping[str, float]) -> Plan:
        """The plan of some amounts, each in [0, 1]."""
        count = round(amounts.get('blocks', 0.) * max(1, int(_MOST_BLOCKS * len(self._blocks)))) if self._blocks else 0
        return replace(
            Plan(), blocks=tuple(self._blocks[:count]), channels=_MOST_CHANNELS * amounts.get('channels', 0.),
            share=1 - (1 - self._floor) * amounts.get('share', 0.), kernels=_MOST_KERNELS * amounts.get('kernels', 0.),
            int8=amounts.get('int8', 0.) > 0,  # all or nothing
        ).rounded()

    def measure(self, model: nn.Module, plan: Plan) -> Sizes:
        """What a plan's network costs, its latency only if that is a target, relative to the original's."""
        return self._measure(model, plan, {*_ALWAYS, *self.quantities})

    def _measure(self, model: nn.Module, plan: Plan, quantities: set[str]) -> Sizes:
        latency = self.original.latency
        anchor = None if latency is None else (self._anchor, latency)
        return measure_sizes(model, self.subject, quantities, anchor, 'int8' if plan.int8 else 'float')

    def sizes(self, plan: Plan) -> Sizes | None:
        """What a plan's network will cost of the targeted quantities; None where a technique refuses."""
        if plan not in self._sizes:
            try:
                self._sizes[plan] = self._measure(plan.make(self.model, self.subject), plan, self.quantities)
            except LeanError:
                self._sizes[plan] = None
        return self._sizes[plan]

    def excess(self, sizes: Sizes) -> float:
        """The largest ratio of a quantity to its limit: at most 1 where all targets are met."""
        return max(sizes[t.quantity] / t.limit(self.original) for t in self.targets)

    def reach(self, mix: Mapping[str, float]) -> float | None:
        """The smallest factor for the amounts of a mix with which all targets are met; None if none is.

        By regula falsi and now and then a halving: sizes fall about straight, but in steps.

        Args:
            mix: Amounts in [0, 1] of which the largest is 1.
        """
        low, high = 0., 1.
        start = self.sizes(self.plan({'int8': 1.})) if 'int8' in mix else self.original  # it is all or nothing
        above = self.excess(start or self.original)
        if above <= _AIM:
            return _LEAST
        end = self.sizes(self.plan(mix))
        while end is None and high > 0.25:  # where a technique refuses its largest amount
            high -= 0.25
            end = self.sizes(self.plan(scaled(mix, high)))
        if end is None or self.excess(end) > _AIM:
            return None
        below = self.excess(end)
        for step in range(_STEPS):
            if below >= _CLOSE:
                break
            part = 0.5 if step % 3 == 2 else (above - (_AIM + _CLOSE) / 2) / max(above - below, 1e-9)
            middle = low + (high - low) * min(max(part, _EDGE), 1 - _EDGE)
            sizes = self.sizes(self.plan(scaled(mix, middle)))
            excess = 2. if sizes is None else self.excess(sizes)
            if excess <= _AIM:
                high, below = middle, excess
            else:
                low, above = middle, excess
        return high

    def reachable(self) -> dict[str, dict[str, float]]:
        """The smallest share of each targeted quantity that each technique alone, and all together, can give."""
        mixes = {name: {name: 1.} for name in self.techniques}
        if len(mixes) > 1:
            mixes['all together'] = dict.fromkeys(self.techniques, 1.)
        table = {}
        for name, mix in mixes.items():
            for factor in (1., 0.75, 0.5, 0.25):
                sizes = self.sizes(self.plan(scaled(mix, factor)))
                if sizes is not None:
                    table[name] = {t.quantity: sizes[t.quantity] / self.original[t.quantity] for t in self.targets}
                    break
        return table


def scaled(mix: Mapping[str, float], factor: float) -> dict[str, float]:
    """Amounts times a factor."""
    return {name: amount * factor for name, amount in mix.items()}
