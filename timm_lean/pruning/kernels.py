"""Pruning single kernels: choose the weak ones, set them to zero, keep them there through further training.

Paper: https://arxiv.org/abs/2102.02804 (by threshold; relative to the filter, "contribution"; a share per filter,
"sorted").

A pruned kernel is one that is zero (see `zeros`). While training goes on, the pruner knows which kernels are dead and
zeroes them again after every optimizer step, whatever momentum or weight decay did.
"""
import copy
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from timm_lean.calibration import Calibration, calibrate, output_scores
from timm_lean.checkpoint.recipe import has_step, note_zeros, record_step, register_step
from timm_lean.errors import LeanError
from timm_lean.layers.filter_banks import FilterBank, check_finite, find_filter_banks
from timm_lean.layers.lean_report import hand_over
from timm_lean.layers.patterns import Patterns

from .report import KernelReport, report_banks
from .schedule import PruneSchedule
from .spectral import below, check_criterion, degree, kernel_scores
from .zeros import ZeroKeeper

__all__ = ['STEP', 'KernelPruner', 'prune_kernels']

STEP = 'prune_kernels'
SCOPES = ('global', 'layer', 'filter')
_logger = logging.getLogger(__name__)


class KernelPruner(ZeroKeeper):
    """Prunes kernels of a model's filter banks: every `nn.Conv2d`, and each shared basis once.

    Exactly one of `threshold`, `contrib` and `amount` says how much is pruned. With a model and an optimizer:

        pruner = KernelPruner(model, amount=0.7, schedule='cubic', begin=10, end=30)
        for epoch in range(40):
            for step, batch in enumerate(loader):
                pruner.set_progress(epoch + step / len(loader))
                ...
                optimizer.step()
                pruner.step()          # or once, before the loop: pruner.attach(optimizer)

    Args:
        model: The model, on any device; of a wrapped one (DDP, torch.compile, EMA) the model inside.
        criterion: How kernels are scored, see `spectral`.
        threshold: Prune kernels below the paper's threshold for this t (`det`: t^k, `det_gram`: t^2k). The paper: 1e-4.
        contrib: Prune kernels whose share of their filter's total score is below this. The paper: 1e-3.
        amount: Prune this share of the kernels, in [0, 1), those with the lowest scores. Kernels that are already dead
            count.
        scope: Whether `amount` is a share of all kernels together ('global'), of each layer's ('layer'), or of each
            filter's ('filter', the paper's "sorted"). Globally, scores of degree d in the weights (`det`: k,
            `det_gram`: 2k) are compared by their d-th root, so that kernels of different size can be.
        include: Shell patterns on module names, a list or joined by `|`; only what matches is pruned. All if None.
        exclude: Patterns of what is never pruned.
        min_keep: Share of kernels that each layer keeps at least (one kernel, if above 0).
        schedule: 'one_shot', 'linear', 'cubic' or 'exponential'; all but the first need `amount`.
        begin: Progress at which pruning begins, in the unit of `set_progress`.
        end: Progress at which the full amount is reached.
        every: Progress between two updates of the masks.
        seed: For the criterion 'random'.
        again: Prune a model that has been pruned before. Its zero kernels stay dead.
        scores: Scores `[N, C]` by name of the filter bank, instead of the criterion's; they stay as they are.

    Raises:
        LeanError: Contradicting or unusable arguments, no convolutions, NaN weights, kernels that the criterion cannot
            score, or a model that has been pruned before.
    """

    def __init__(
            self,
            model: nn.Module,
            *,
            criterion: str = 'spectral_norm',
            threshold: float | None = None,
            contrib: float | None = None,
            amount: float | None = None,
            scope: str = 'global',
            include: Patterns = None,
            exclude: Patterns = None,
            min_keep: float = 0.01,
            schedule: str = 'one_shot',
            begin: float = 0.0,
            end: float | None = None,
            every: float = 1.0,
            seed: int = 0,
            again: bool = False,
            scores: Mapping[str, torch.Tensor] | None = None,
    ):
        self.criterion = check_criterion(criterion) if scores is None else criterion
        self._scores = scores
        given = {k: v for k, v in dict(threshold=threshold, contrib=contrib, amount=amount).items() if v is not None}
        if len(given) != 1:
            raise LeanError(f'Pruning needs exactly one of threshold, contrib and amount, got {given or "none"}.')
        (self.rule, self.value), = given.items()
        if amount is not None and not 0 <= amount < 1:
            raise LeanError(f'The pruning amount must be at least 0 and below 1, got {amount!r}.')
        if amount is None and not 0 <= self.value < math.inf:
            raise LeanError(f'The pruning {self.rule} must be a number of at least 0, got {self.value!r}.')
        if criterion == 'random' and threshold is not None:
            raise LeanError("The criterion 'random' has no threshold. Give an amount.")
        if scope not in SCOPES:
            raise LeanError(f'Unknown pruning scope {scope!r}. Known: {", ".join(SCOPES)}.')
        if not 0 <= min_keep <= 1:
            raise LeanError(f'min_keep must be between 0 and 1, got {min_keep!r}.')
        self.schedule = PruneSchedule(schedule, begin, end, every)
        if amount is None and schedule != 'one_shot':
            raise LeanError(f'The schedule {schedule!r} needs an amount; by {self.rule} pruning is one_shot.')
        super().__init__(model)
        self.banks = find_filter_banks(self.model, include, exclude, user='Kernel pruning')
        pruned_before = has_step(self.model, STEP)
        if pruned_before and not again:
            raise LeanError('The kernels of this model have been pruned before. If pruning them again is meant, say '
                            'again=True (--again).')
        self.scope, self.min_keep, self.seed = scope, min_keep, seed
        check_finite(self.banks, 'Kernel pruning')
        for bank in self.banks:  # fails now, not in the first update
            self._score(bank, bank.weight[:1, :1])
        self.updates = 0
        self._kept: dict[str, int] = {}
        if not pruned_before:
            self._dead = {}  # zeros that nobody pruned may come to life

    @property
    def report(self) -> KernelReport:
        """Zero kernels per layer, counted now."""
        return report_banks(self.model, self.banks, self._kept)

    def set_progress(self, progress: float) -> bool:
        """Renew the masks if the schedule asks for it at this progress; returns whether it did."""
        due = self.schedule.due(progress)
        if due <= self.updates:
            return False
        self.prune(self.schedule.amount(due, self.value) if self.rule == 'amount' else self.value, due)
        self.updates = due
        return True

    @torch.no_grad()
    def prune(self, value: float | None = None, update: int = 1) -> KernelReport:
        """Prune now, whatever the schedule.

        Args:
            value: The amount, threshold or contribution; the pruner's own if None.
            update: Number of the update, which the criterion 'random' draws by.

        Raises:
            LeanError: NaN weights.
        """
        value = self.value if value is None else value
        check_finite(self.banks, 'Kernel pruning')
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + update)
        scores = {}
        for bank in self.banks:
            scores[bank.name] = self._score(bank, bank.weight, generator)
            if bank.name in self._dead:  # what is dead is chosen first, whatever the criterion
                scores[bank.name].masked_fill_(self._dead[bank.name].to(scores[bank.name].device), -1)
        if self.rule == 'amount' and self.scope == 'global':
            chosen = self._lowest_of_all(scores, value)
        else:
            chosen = {bank.name: self._choose(bank, scores[bank.name], value) for bank in self.banks}
        self._kept = {}
        for bank in self.banks:
            dead = self._keep_some(bank.name, chosen[bank.name], scores[bank.name])
            before = self._dead.get(bank.name)
            self._dead[bank.name] = dead if before is None else dead | before.to(dead.device)
        if self._kept:
            kept = sum(self._kept.values())
            _logger.warning(f'min_keep={self.min_keep:g} kept {kept:,} kernels in {len(self._kept)} layers that the '
                            f'criterion {self.criterion!r} would have pruned: {", ".join(list(self._kept)[:5])}.')
        self.step()
        self._record()
        return self.report

    def state_dict(self) -> dict[str, Any]:
        """Plain data to resume by. The masks are not in it: they are the zeros in the model's weights."""
        return {'updates': self.updates, 'pruned': bool(self._dead)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume, after the model's weights have been loaded."""
        self.updates = state['updates']
        if state['pruned']:
            self._dead_from_zeros()
            self.step()
            self._record()

    def _record(self) -> None:
        for model in (self.model, *self._followers):
            if not has_step(model, STEP):
                record_step(model, STEP, criterion=self.criterion, **{self.rule: self.value})
            note_zeros(model)

    def _score(self, bank: FilterBank, weight: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        if self._scores is not None:
            return self._scores[bank.name].clone()
        try:
            return kernel_scores(weight, self.criterion, generator)
        except LeanError as e:
            raise LeanError(f'{bank.name}: {e} Or leave the layer out: exclude={bank.name!r}.') from e

    def _choose(self, bank: FilterBank, scores: torch.Tensor, value: float) -> torch.Tensor:
        """Mask `[N, C]` of the kernels to prune, by the rules that look at one layer."""
        if self.rule == 'threshold':
            return below(scores, self.criterion, value, bank.weight.shape[2])
        if self.rule == 'contrib':
            scores = scores.clamp(min=0)  # the -1 of the dead
            total = scores.sum(1, keepdim=True)
            return (scores < value * total) | ((total == 0) & (value > 0))
        rows = scores if self.scope == 'filter' else scores.flatten()[None]
        return _lowest(rows, int(value * rows.shape[1] + 1e-9)).view(scores.shape)

    def _lowest_of_all(self, scores: dict[str, torch.Tensor], value: float) -> dict[str, torch.Tensor]:
        flat = []
        for bank in self.banks:
            values = scores[bank.name].flatten().cpu()
            root = 1 / degree(self.criterion, bank.weight.shape[2])
            flat.append(values.clamp(min=0) ** root - (values < 0).double())
        ranked = torch.cat(flat)[None]
        parts = _lowest(ranked, int(value * ranked.shape[1] + 1e-9))[0].split([len(f) for f in flat])
        return {bank.name: part.view(scores[bank.name].shape).to(scores[bank.name].device)
                for bank, part in zip(self.banks, parts, strict=True)}

    def _keep_some(self, name: str, chosen: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Give the best of the chosen kernels back to a layer that would keep too few."""
        limit = chosen.numel() - math.ceil(self.min_keep * chosen.numel())
        count = int(chosen.sum())
        if count <= limit:
            return chosen
        self._kept[name] = count - limit
        ranked = scores.masked_fill(~chosen, math.inf).flatten()[None]
        return _lowest(ranked, limit).view(chosen.shape)


def prune_kernels(
        model: nn.Module,
        *,
        criterion: str = 'spectral_norm',
        threshold: float | None = None,
        contrib: float | None = None,
        amount: float | None = None,
        scope: str = 'global',
        include: Patterns = None,
        exclude: Patterns = None,
        min_keep: float = 0.01,
        seed: int = 0,
        again: bool = False,
        calibration: Calibration | Iterable[Any] | None = None,
) -> nn.Module:
    """Prune a model's kernels once. To prune while training, and for what the other options mean: `KernelPruner`.

    Args:
        criterion: One of `spectral`'s, or 'output': by how much the output error of a layer grows if the kernel goes,
            relative to the layer's mean (`calibration.output_scores`).
        calibration: A few hundred images as batches `[B, C, H, W]`, or tuples that start with them: the kernels that
            are left make up for those that went, see `calibrate`.

    Returns:
        A new model in the given one's mode, with a `KernelReport` as `.lean_report`; the given one is unchanged.

    Raises:
        LeanError: As `KernelPruner`.
    """
    model = unwrap_model(model)
    new = copy.deepcopy(model)
    scores = None
    if calibration is not None:
        calibration = Calibration.of(calibration).hold()
    if criterion == 'output':
        if calibration is None or amount is None:
            raise LeanError("criterion='output' needs calibration=LOADER (--data-dir DIR), whose images say what a "
                            'kernel does, and an amount.')
        names = [bank.name for bank in find_filter_banks(model, include, exclude, user='Kernel pruning')]
        scores = output_scores(model, names, calibration)
    report = KernelPruner(
        new, criterion=criterion, threshold=threshold, contrib=contrib, amount=amount, scope=scope, include=include,
        exclude=exclude, min_keep=min_keep, seed=seed, again=again, scores=scores).prune()
    if calibration is not None:
        new = calibrate(new, model, calibration)
    return hand_over(new, report, 'Kernel pruning')


def _lowest(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of exactly the `count` lowest entries of each row `[R, C]`; the first ones where values are equal."""
    mask = torch.zeros_like(rows, dtype=torch.bool)
    if count == 0:
        return mask
    order = rows.sort(dim=1, stable=True).indices[:, :count]
    return mask.scatter_(1, order, True)


@register_step(STEP)
def _rebuild(
        model: nn.Module, criterion: str,
        threshold: float | None = None, contrib: float | None = None, amount: float | None = None,
) -> nn.Module:
    """A network with pruned kernels is the same network: the zeros come with the weights."""
    return model
