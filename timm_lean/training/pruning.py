"""The kernel pruner that a training run's settings ask for."""
import torch.nn as nn

from timm_lean.checkpoint.recipe import has_step
from timm_lean.errors import LeanError
from timm_lean.pruning import KernelPruner, ZeroKeeper
from timm_lean.pruning.kernels import STEP

from .config import TrainConfig

__all__ = ['create_pruner']


def create_pruner(model: nn.Module, config: TrainConfig) -> ZeroKeeper | None:
    """A pruner as configured, or what only keeps a pruned model's zeros; None if there is nothing to prune.

    Its progress is counted in optimizer updates with `prune_steps`, in epochs otherwise.

    Raises:
        LeanError: Settings that contradict each other, or a model that cannot be pruned so.
    """
    pruned = has_step(model, STEP)
    if not config.prune:
        return ZeroKeeper(model) if pruned else None
    if pruned and not config.prune_again:
        raise LeanError(f'The kernels of {config.model} have been pruned before and stay so without --prune. If '
                        'pruning more of them is meant, add --prune-again.')
    begin, end = _span(config)
    if not config.prune_steps and (begin >= config.epochs or (end or 0) > config.epochs):
        raise LeanError(f'--prune-epochs {config.prune_epochs} does not fit into the {config.epochs} epochs of the '
                        'run.')
    return KernelPruner(
        model, criterion=config.prune, amount=config.prune_amount, threshold=config.prune_threshold,
        scope=config.prune_scope, exclude=config.prune_ignore or None, min_keep=config.prune_min_keep,
        schedule=config.prune_schedule, begin=begin, end=end, every=config.prune_every, seed=config.seed,
        again=config.prune_again)


def _span(config: TrainConfig) -> tuple[float, float | None]:
    """BEGIN[:END] as numbers."""
    text = str(config.prune_steps or config.prune_epochs or '0')
    begin, _, end = text.partition(':')
    try:
        return float(begin), float(end) if end else None
    except ValueError:
        option = '--prune-steps' if config.prune_steps else '--prune-epochs'
        raise LeanError(f'{option} takes BEGIN:END, such as 10:30, got {text!r}.') from None
