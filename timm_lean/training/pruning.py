"""Kernel pruning while training: a `KernelPruner` driven by the run's settings and its count of updates."""
from typing import Any

import torch.nn as nn

from timm_lean.errors import LeanError
from timm_lean.pruning import KernelPruner
from timm_lean.pruning.kernels import STEP

from .config import TrainConfig

__all__ = ['TrainingPruner']


class TrainingPruner:
    """Prunes by the schedule of a training run, and keeps at zero what is pruned.

    Args:
        pruner: Acts on the model that is trained.
        unit: 'epochs' or 'steps' (optimizer updates), what the schedule counts in; '' keeps what is pruned already.
    """

    def __init__(self, pruner: KernelPruner, unit: str):
        self._pruner, self._unit = pruner, unit

    @classmethod
    def of(cls, model: nn.Module, config: TrainConfig) -> 'TrainingPruner | None':
        """The pruner that a run needs: as configured, or one that holds a pruned model's zeros; else None.

        Raises:
            LeanError: Settings that contradict each other, or a model that cannot be pruned so.
        """
        pruned = any(step['op'] == STEP for step in getattr(model, 'lean_steps', []))
        if pruned and config.prune and not config.prune_again:
            raise LeanError(f'The kernels of {config.model} have been pruned before and stay so without --prune. If '
                            'pruning more of them is meant, add --prune-again.')
        if not config.prune:
            return cls(KernelPruner(model, 'weight', amount=0., again=True), '') if pruned else None
        unit = 'steps' if config.prune_steps else 'epochs'
        begin, end = _span(config.prune_steps or config.prune_epochs, unit)
        if unit == 'epochs' and (begin >= config.epochs or (end or 0) > config.epochs):
            raise LeanError(f'--prune-epochs {config.prune_epochs} does not fit into the {config.epochs} epochs of the '
                            'run.')
        return cls(KernelPruner(
            model, config.prune, amount=config.prune_amount, threshold=config.prune_threshold,
            scope=config.prune_scope, ignore=config.prune_ignore or None, min_keep=config.prune_min_keep,
            schedule=config.prune_schedule, begin=begin, end=end, every=config.prune_every, seed=config.seed,
            again=config.prune_again), unit)

    @property
    def share(self) -> float:
        """Kernels that are zero, as a share of all."""
        return self._pruner.report.share

    def set_progress(self, updates: int, updates_per_epoch: int) -> bool:
        """Prune if the schedule asks for it after so many updates; returns whether it did."""
        if not self._unit:
            return False
        return self._pruner.set_progress(updates / updates_per_epoch if self._unit == 'epochs' else updates)

    def follow(self, ema: nn.Module) -> None:
        """Keep the same kernels of an EMA's model at zero."""
        self._pruner.follow(ema)

    def step(self) -> None:
        """Zero the dead kernels again, after an update of the weights."""
        self._pruner.step()

    def state_dict(self) -> dict[str, Any]:
        return self._pruner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pruner.load_state_dict(state)


def _span(text: str, unit: str) -> tuple[float, float | None]:
    """BEGIN[:END] as numbers."""
    begin, _, end = str(text or '0').partition(':')
    try:
        return float(begin), float(end) if end else None
    except ValueError:
        raise LeanError(f'--prune-{unit} takes BEGIN:END in {unit}, such as 10:30, got {text!r}.') from None
