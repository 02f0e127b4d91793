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

    Its progress is counted in optimizer updates with `prune.steps`, in epochs otherwise.

    Raises:
        LeanError: Settings that contradict each other, or a model that cannot be pruned so.
    """
    prune, pruned = config.prune, has_step(model, STEP)
    if not prune.criterion:
        return ZeroKeeper(model) if pruned else None
    if pruned and not prune.again:
        raise LeanError(f'The kernels of {config.model} have been pruned before and stay so without --prune. If '
                        'pruning more of them is meant, add --prune-again.')
    begin, end = prune.span()
    if not prune.steps and (begin >= config.epochs or (end or 0) > config.epochs):
        raise LeanError(f'--prune-epochs {prune.epochs} does not fit into the {config.epochs} epochs of the run.')
    return KernelPruner(
        model, criterion=prune.criterion, amount=prune.amount, threshold=prune.threshold, scope=prune.scope,
        include=prune.include or None, exclude=prune.exclude or None, min_keep=prune.min_keep, schedule=prune.schedule,
        begin=begin, end=end, every=prune.every, seed=config.seed, again=prune.again)
