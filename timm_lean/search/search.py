"""`compress`: from a wish to a network, by searching mixes of techniques.

A mix is a direction: so much of each technique relative to the others. How far one has to go in it follows from the
targets and needs no calibration (`space`), so each mix is one candidate: calibrated, judged, noted (`journal`). First
every technique alone, at the target and at half the way, which gives its curve of losses; then mixes, those first for
which the curves promise most (`curves`); then the neighbours of the best.
"""
import copy
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from timm_lean.errors import LeanError
from timm_lean.layers.lean_report import hand_over

from .curves import Curve, Mix, all_mixes, neighbours, predict_factor, predict_loss
from .journal import Journal, fingerprint
from .judge import Judge, split_images
from .outlook import Outlook
from .plan import TECHNIQUES, Plan
from .progress import Progress
from .report import Candidate, CompressReport
from .space import Space, scaled
from .subject import subject_of
from .target import TargetError, TargetSpec, parse_targets

__all__ = ['compress', 'reachable']

_PARTS = 3  # amounts of a mix are multiples of 1 / 3
_STEP = 1 / 6  # to a neighbour
_MOST_MIXES = 24
_PATIENCE = 5  # mixes in a row without a better one
_TUNED = 2  # candidates that are trained further
_FIRST = ('int8', 'share', 'kernels', 'channels', 'blocks')  # what costs least accuracy, as a rule
_ANY = 1e-3  # an amount of a technique that is all or nothing
_BACK = (0.5, 0.75, 0.25, 0.875, 0.625, 0.375, 0.125)  # of the way to a target that costs too much


def compress(
        model: nn.Module,
        target: TargetSpec,
        batches: Iterable[Any],
        *,
        evaluate: Callable[[nn.Module], float] | None = None,
        techniques: Collection[str] = TECHNIQUES,
        max_drop: float | None = None,
        minutes: float = 20.,
        finetune: Callable[[nn.Module], nn.Module] | None = None,
        nearest: bool = False,
        folder: str | Path | None = None,
        resume: bool = False,
        progress: bool = False,
) -> nn.Module:
    """Find the most accurate network that meets a target.

    Args:
        model: The trained network, a classifier or a detector of MMDetection (with its `cfg`, as `open_detector` gives
            it); it is not changed.
        target: `'params=0.5'`, `{'latency': 0.7, 'file': '500kB'}`: a share of the original's below 1, or a number with
            a unit. Quantities: params, macs, file, latency (of one image, where the model is).
        batches: A few hundred images as batches `[B, C, H, W]`, or tuples that start with them; labels are not read.
        evaluate: Accuracy of a network in per cent, on images that `batches` does not hold. Without, a quarter of the
            batches is held out, and a network is judged by how often its first choice is the original's; a detector by
            the outputs of its heads. For its AP see `timm_lean.mmdet.average_precision`.
        techniques: Those of 'blocks', 'channels', 'share', 'kernels' and 'int8' that may be used.
        max_drop: At most so many points of `evaluate` may be lost.
        minutes: Time for the search; the network that is being made when it ends is finished, `finetune` comes after.
        finetune: Trains a network further and returns it; the best two candidates get it.
        nearest: Where no network meets the targets within `max_drop`, return the one within it that comes nearest to
            them instead of raising.
        folder: Candidates are noted there as they come, for `resume`.
        resume: Go on with the search in `folder`.
        progress: Show a progress bar.

    Returns:
        A new network in eval mode, with a `CompressReport` as `.lean_report`. Save it with
        `save_model(new, path, weights=new.lean_report.weights)`, a detector with `write_detector`.

    Raises:
        TargetError: The targets are out of reach, or not within `max_drop`.
        LeanError: Arguments that cannot be met, or too little time for one candidate.
    """
    search = _Search(model, target, batches, evaluate, techniques, max_drop, minutes, folder, resume, progress)
    return search.run(finetune, nearest)


def reachable(
        model: nn.Module,
        target: TargetSpec,
        batches: Iterable[Any],
        *,
        evaluate: Callable[[nn.Module], float] | None = None,
        techniques: Collection[str] = TECHNIQUES,
        max_drop: float | None = None,
        minutes: float = 20.,
        finetune: Callable[[nn.Module], nn.Module] | None = None,
        nearest: bool = False,
) -> Outlook:
    """What `compress` could reach with the same arguments, and what it would do; it takes no calibration.

    Of `evaluate` and `finetune` it matters only whether they are given: no network is judged or trained.

    Returns:
        A printable `Outlook`: how small each technique, and all together, can make each targeted quantity; the networks
        that a search starts with; what is left out, with the reason.

    Raises:
        LeanError: Arguments that cannot be met.
    """
    _check(techniques, max_drop, minutes, evaluate)
    score = None if evaluate is None else lambda model: 0.
    search = _Search(model, target, batches, score, techniques, max_drop, float('inf'), None, False, False)
    return search.outlook(minutes, finetune is not None, nearest)


class _Search:
    """One search."""

    def __init__(
            self, model: nn.Module, target: TargetSpec, batches: Iterable[Any],
            evaluate: Callable[[nn.Module], float] | None, techniques: Collection[str], max_drop: float | None,
            minutes: float, folder: str | Path | None, resume: bool, progress: bool):
        self.start = time.monotonic()
        self.targets = parse_targets(target)
        _check(techniques, max_drop, minutes, evaluate)
        self.minutes, self.max_drop = minutes, max_drop
        self.model = copy.deepcopy(unwrap_model(model)).eval()
        self.images, held = split_images(batches, judging=evaluate is None)
        self.held = sum(map(len, held))
        self.subject = subject_of(self.model, self.images)
        try:
            self.judge = Judge(self.subject, evaluate, held)
        except (RuntimeError, ValueError, TypeError, AssertionError) as e:
            raise LeanError(f'{type(self.model).__name__} cannot be judged on images '
                            f'{list(self.images[0].shape[1:])}: '
                            f'{type(e).__name__}: {str(e).partition(chr(10))[0][:200]}') from e
        self.journal = Journal(folder, fingerprint(self.subject, [*self.images, *held], self.judge.says), resume)
        same = [x for x in self.images if x.shape[1:] == self.images[0].shape[1:]]
        ranking = torch.cat(same)[:self.subject.ranking_images].to(self.subject.x.device)
        self.progress = Progress(progress, minutes, self.start)
        self.progress.stage('looking at what each technique can do')
        try:
            self.space = Space(self.subject, ranking, techniques, self.targets)
        except BaseException:
            self.progress.bar.close()
            raise
        self.original = Candidate(Plan(), self.space.original, self.judge.reference)
        self.limits = [t.limit(self.original.sizes) / self.original.sizes[t.quantity] for t in self.targets]
        self.found: dict[Plan, Candidate] = {}
        self.ways: dict[Plan, dict[str, float]] = {}  # the amounts of each
        self.losses: dict[str, dict[float, float]] = {name: {0.: 0.} for name in self.space.techniques}
        self.networks: dict[Plan, nn.Module] = {}  # of the best, so that they need not be made twice
        self.tuned: dict[Plan, nn.Module] = {}

    def run(self, finetune: Callable[[nn.Module], nn.Module] | None, nearest: bool) -> nn.Module:
        """The whole search."""
        try:
            return self._run(finetune, nearest)
        except TargetError:
            self.journal.finish()  # there is nothing more to find
            raise

    def _run(self, finetune: Callable[[nn.Module], nn.Module] | None, nearest: bool) -> nn.Module:
        with self.progress.bar:
            if self._met(self.original):
                return self._finish(self.original, self.model)
            if not self.space.techniques:
                raise TargetError(f'Nothing that may be used brings {self._wish}: '
                                  + '; '.join(f'{name}: {why}' for name, why in self.space.refused.items()))
            self._single_techniques()
            self._mixes()
            best = self._sorted([c for c in self.found.values() if self._met(c)])
            if not best:
                candidate = self._without_any(nearest)
                return self._finish(candidate, self._network(candidate))
            tuned = []
            if finetune is not None:
                self.progress.stage('fine-tuning')
                tuned = [self._tune(c, finetune) for c in best[:_TUNED]]
                best = self._sorted([*tuned, *best])
            if not self._allowed(best[0]):
                best = [self._nearest(best[0], nearest)]
        return self._finish(best[0], self._network(best[0]), tuned)

    def outlook(self, minutes: float, finetune: bool, nearest: bool) -> Outlook:
        """What `run` would do."""
        plans = [] if self._met(self.original) else [self.space.plan(amounts) for amounts in self._single_amounts()]
        return Outlook(
            targets=self.targets, original=self.original.sizes, smallest=self.space.reachable(),
            refused=dict(self.space.refused),
            networks=tuple(plan for plan in dict.fromkeys(plans) if plan != Plan()),
            most_mixes=_MOST_MIXES, patience=_PATIENCE, minutes=minutes,
            judged_by=self.judge.name, calibration_images=sum(map(len, self.images)), held_out_images=self.held,
            max_drop=self.max_drop, nearest=nearest, finetuned=_TUNED if finetune else 0)

    # what is tried -------------------------------------------------------------------------------------------------

    def _single_techniques(self) -> None:
        """Every technique alone."""
        self.progress.stage('each technique alone')
        for amounts in self._single_amounts():
            self._try(amounts)

    def _single_amounts(self) -> Iterator[dict[str, float]]:
        """Of every technique alone: as far as the target asks, or as it goes, and half of that.

        Of a search that is cut short the first network is an answer: one technique that meets the targets, else all
        together.
        """
        reaches: dict[str, float | None] = {}
        for name in sorted(self.space.techniques, key=_FIRST.index):
            if self._late:  # to find out how far the others go takes time as well
                return
            reaches[name] = factor = self.space.reach({name: 1.})
            if factor is not None:
                yield {name: factor}
        if not any(reaches.values()):
            everything = dict.fromkeys(reaches, 1.)
            factor = self.space.reach(everything)
            if factor is not None:
                yield scaled(everything, factor)
        for part in (1., 0.5):
            for name, factor in reaches.items():
                yield {name: part * (factor or 1.)}

    def _mixes(self) -> None:
        """Mixes, the most promising first, until none is better for a while."""
        if self._late:
            return
        self.progress.stage('mixes of techniques')
        names = self.space.techniques
        waiting = set(filter(_sensible, all_mixes(names, _PARTS)))
        seen: set[Mix] = {((name, 1.),) for name in names}
        shares = {name: self._shares(name) for name in names}
        best, idle = float('inf'), 0
        for _ in range(_MOST_MIXES):
            if not waiting or idle >= _PATIENCE or self._late:
                return
            mix = min(sorted(waiting), key=lambda mix: self._promise(mix, shares))
            waiting.discard(mix)
            seen.add(mix)
            factor = self.space.reach(dict(mix))
            candidate = None if factor is None else self._try(scaled(dict(mix), factor))
            if candidate is None:
                continue
            drop, idle = self.original.score - candidate.score, idle + 1
            if drop < best and self._met(candidate):
                best, idle = drop, 0
                waiting |= set(filter(_sensible, neighbours(mix, names, _STEP))) - seen

    def _promise(self, mix: Mix, shares: Mapping[str, list[Curve]]) -> float:
        factor = predict_factor(mix, shares, self.limits)
        losses = {name: Curve(points, quadratic=True) for name, points in self.losses.items()}
        return float('inf') if factor is None else predict_loss(mix, factor, losses)

    def _shares(self, name: str) -> list[Curve]:
        """What a technique alone leaves of each targeted quantity."""
        points: list[dict[float, float]] = [{0.: 1.} for _ in self.targets]
        for amount in (_ANY, 1.) if name == 'int8' else (0.25, 0.5, 0.75, 1.):
            sizes = self.space.sizes(self.space.plan({name: amount}))
            for target, curve in zip(self.targets, points, strict=True):
                if sizes is not None:
                    curve[amount] = sizes[target.quantity] / self.original.sizes[target.quantity]
        return [Curve(curve) for curve in points]

    def _try(self, amounts: Mapping[str, float], even_late: bool = False) -> Candidate | None:
        """Make, calibrate and judge a network; None if the time is over or a technique refuses."""
        plan = self.space.plan(amounts)
        if plan != Plan() and plan not in self.found:
            noted = self.journal.get(plan)
            if noted is not None and not noted[0].hold(self.space.quantities):  # of a search for something else
                noted = None
            if noted is None and (even_late or not self._late):
                start = time.monotonic()
                try:
                    network = plan.make(self.model, self.subject, self.images)
                except LeanError:
                    return None
                noted = self.space.measure(network, plan), self.judge(network)
                self.journal.add(plan, *noted, time.monotonic() - start)
                self.networks[plan] = network
            if noted is not None:
                self.found[plan] = Candidate(plan, *noted)
                self._note(self.found[plan], amounts)
        return self.found.get(plan)

    def _note(self, candidate: Candidate, amounts: Mapping[str, float]) -> None:
        self.ways[candidate.plan] = dict(amounts)
        if len(amounts) == 1:
            (name, amount), = amounts.items()
            loss = max(self.original.score - candidate.score, 0.)
            self.losses[name].update({_ANY: loss, 1.: loss} if name == 'int8' else {amount: loss})
        keep = {c.plan for c in self._sorted([c for c in self.found.values() if self._met(c)])[:_TUNED]}
        self.networks = {plan: network for plan, network in self.networks.items() if plan in keep}
        self.progress.network(f'{self.judge.name} {candidate.score:.2f} %', str(candidate))

    def _tune(self, candidate: Candidate, finetune: Callable[[nn.Module], nn.Module]) -> Candidate:
        plan = candidate.plan
        trained = finetune(copy.deepcopy(self._network(candidate))).eval()
        network = plan.stored(trained, self.subject, self.images)
        tuned = Candidate(plan, self.space.measure(network, plan), self.judge(network), tuned=True)
        self.tuned[plan] = network
        return tuned

    # what is chosen ------------------------------------------------------------------------------------------------

    def _met(self, candidate: Candidate) -> bool:
        return self.space.excess(candidate.sizes) <= 1

    def _allowed(self, candidate: Candidate) -> bool:
        return self.max_drop is None or self.original.score - candidate.score <= self.max_drop

    def _sorted(self, candidates: list[Candidate]) -> list[Candidate]:
        """The best first; of equally good ones the smaller."""
        return sorted(candidates, key=lambda c: (-c.score, self.space.excess(c.sizes)))

    def _without_any(self, wanted: bool) -> Candidate:
        """Where no network meets the targets: the nearest one, if that will do."""
        if wanted and self.found:
            return self._nearest_of(min(self.found.values(), key=lambda c: self.space.excess(c.sizes)))
        if self._late:
            raise LeanError(f'minutes={self.minutes:g} was too short: {len(self.found)} networks were judged by then, '
                            f'and none of them meets {self._wish}. Give more minutes or fewer images.')
        smallest = {name: ', '.join(f'{quantity} {share:.3g}' for quantity, share in shares.items())
                    for name, shares in self.space.reachable().items()}
        raise TargetError(f'{self._wish} is out of reach. The smallest shares: '
                          + '; '.join(f'{name}: {text}' for name, text in smallest.items()))

    def _nearest_of(self, best: Candidate) -> Candidate:
        """This network if it is within `max_drop`, else what comes nearest to the targets on the way to it."""
        if not self._allowed(best):
            for factor in _BACK:
                if self._late and any(map(self._allowed, self.found.values())):
                    break
                self._try(scaled(self.ways[best.plan], factor), even_late=True)
        allowed = [c for c in (self.original, *self.found.values()) if self._allowed(c)]
        return min(allowed, key=lambda c: self.space.excess(c.sizes))

    def _nearest(self, best: Candidate, wanted: bool) -> Candidate:
        """The network within `max_drop` that comes nearest to the targets, instead of one that costs too much."""
        candidate = self._nearest_of(best)
        lost = self.original.score - best.score
        report = self._report(candidate, []).summary
        if wanted:
            return candidate
        raise TargetError(
            f'{self._wish} costs {lost:.2f} points at least, more than max_drop={self.max_drop:g}. The nearest network '
            f'that does not: {report}', nearest=report)

    def _network(self, candidate: Candidate) -> nn.Module:
        if candidate.tuned:
            return self.tuned[candidate.plan]
        if candidate.plan not in self.networks:
            self.networks[candidate.plan] = candidate.plan.make(self.model, self.subject, self.images)
        return self.networks[candidate.plan]

    def _finish(self, candidate: Candidate, network: nn.Module, tuned: list[Candidate] | None = None) -> nn.Module:
        self.journal.finish()
        return hand_over(network.eval(), self._report(candidate, tuned or []), 'Compression')

    def _report(self, chosen: Candidate, tuned: list[Candidate]) -> CompressReport:
        return CompressReport(
            params=(int(self.original.sizes['params']), int(chosen.sizes['params'])),
            targets=tuple(map(str, self.targets)), chosen=chosen, original=self.original,
            candidates=(*self.found.values(), *tuned), judged_by=self.judge.name, met=self._met(chosen),
            refused=tuple(self.space.refused.items()))

    @property
    def _wish(self) -> str:
        return ' and '.join(map(str, self.targets))

    @property
    def _late(self) -> bool:
        return time.monotonic() - self.start > 60 * self.minutes


def _sensible(mix: Mix) -> bool:
    """Whether a technique that is all or nothing is all."""
    return dict(mix).get('int8', 1.) == 1.


def _check(techniques: Any, max_drop: Any, minutes: Any, evaluate: Any) -> None:
    for name in techniques:
        if name not in TECHNIQUES:
            raise LeanError(f'Unknown technique {str(name)[:40]!r}. There are: {", ".join(TECHNIQUES)}.')
    if not techniques:
        raise LeanError(f'Compression needs a technique of {", ".join(TECHNIQUES)}.')
    for name, value, least in (('minutes', minutes, 0), ('max_drop', max_drop, -1e-9)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > least):
            raise LeanError(f'{name} must be a number {"above" if least == 0 else "of at least"} 0, got {value!r}.')
    if max_drop is not None and evaluate is None:
        raise LeanError('max_drop needs evaluate=, the accuracy on labelled images: points of what else?')
