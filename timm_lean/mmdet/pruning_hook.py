"""MMEngine hook: kernels of a detector pruned while it trains, by the same `KernelPruner` as in classification."""
from typing import Any

import torch.nn as nn
from mmengine.hooks import EMAHook, Hook

from timm_lean.checkpoint.recipe import has_step, record_step
from timm_lean.errors import LeanError
from timm_lean.pruning import KernelPruner, ZeroKeeper
from timm_lean.pruning.kernels import STEP
from timm_lean.pruning.report import KernelReport, LayerReport

from .arguments import check_arguments
from .backbone import TimmBackbone
from .hooks import PRUNINGS, submodule, unwrap
from .scope import HOOKS, register

__all__ = ['KernelPruningHook']

_STATE = 'timm_lean_pruner'


@register(HOOKS)
class KernelPruningHook(Hook):
    """Prunes kernels on a schedule and keeps them at zero: through the optimizer, EMAHook, AMP, DDP and resuming.

    With none of `amount`, `threshold` and `contrib` it prunes nothing, and keeps what is zero: for training a detector
    that is pruned already.

    Args:
        criterion: How kernels are scored, see `timm_lean.pruning.spectral`.
        amount: Share of the kernels to prune, in [0, 1).
        threshold: Prune kernels below the criterion's threshold for this t instead.
        contrib: Prune kernels below this share of their filter's total score instead.
        begin: When the schedule begins, in epochs (iterations if not `by_epoch`).
        end: When the full amount is reached; not for 'one_shot'.
        by_epoch: Unit of `begin`, `end` and `every`.
        target: Submodule to prune, by name; '' for the whole detector.
        kwargs: `schedule`, `every`, `scope`, `include`, `exclude`, `min_keep`, `seed` and `again` of `KernelPruner`.

    Raises:
        LeanError: Arguments that `KernelPruner` refuses, an unknown target, a schedule that begins after the training,
            a detector that has been pruned before, nothing to keep, or a second such hook.
    """
    # After EMAHook (NORMAL) has averaged, before checkpoints (VERY_LOW) are written.
    priority = 'BELOW_NORMAL'

    def __init__(
            self,
            criterion: str = 'spectral_norm',
            amount: float | None = None,
            threshold: float | None = None,
            contrib: float | None = None,
            begin: float = 0.,
            end: float | None = None,
            by_epoch: bool = True,
            target: str = 'backbone',
            **kwargs: Any,
    ):
        self.options = dict(
            criterion=criterion, amount=amount, threshold=threshold, contrib=contrib, begin=begin, end=end, **kwargs)
        check_arguments(KernelPruner, self.options, 'KernelPruningHook')
        self.by_epoch, self.target = by_epoch, target
        self.pruner: ZeroKeeper | None = None
        self._resumed: dict[str, Any] | None = None

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        if runner._resume:  # the weights alone do not tell how far the schedule has come
            self._resumed = checkpoint.get('meta', {}).get(_STATE)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        if self.pruner is not None:
            checkpoint['meta'][_STATE] = self.pruner.state_dict()

    def before_train(self, runner: Any) -> None:
        if sum(isinstance(hook, KernelPruningHook) for hook in runner.hooks) > 1:
            raise LeanError('KernelPruningHook is in the config twice (custom_hooks of a base config count too). Keep '
                            'one; its target may be the whole detector.')
        last = runner.max_epochs if self.by_epoch else runner.max_iters
        if max(self.options['begin'], (self.options['end'] or 0) - 1e-9) >= last:
            raise LeanError(f'KernelPruningHook: begin={self.options["begin"]}, end={self.options["end"]} does not fit '
                            f'into the {last} {"epochs" if self.by_epoch else "iterations"} of the training.')
        model = unwrap(runner.model)
        target = submodule(model, self.target, 'KernelPruningHook')
        for part in (model, self._backbone(model)):
            self._record(part, target)  # the pruner looks for earlier prunings there
        self.pruner = self._create(target)
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                averaged = unwrap(hook.ema_model.module)
                self.pruner.follow(submodule(averaged, self.target, 'KernelPruningHook'))
        if self._resumed is not None:
            self.pruner.load_state_dict(self._resumed)
            self._tell_detector(model)
        runner.message_hub.update_info(PRUNINGS, self.pruner.updates)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        assert self.pruner is not None
        per_epoch = len(runner.train_dataloader) if self.by_epoch else 1
        if self.pruner.set_progress(runner.iter / per_epoch):
            self._tell(runner.logger, self.pruner.report)
            runner.message_hub.update_info(PRUNINGS, self.pruner.updates)
            self._tell_detector(unwrap(runner.model))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        assert self.pruner is not None
        self.pruner.step()

    def _create(self, target: nn.Module) -> ZeroKeeper:
        if any(self.options[rule] is not None for rule in ('amount', 'threshold', 'contrib')):
            return KernelPruner(target, **self.options)
        keeper = ZeroKeeper(target)
        if not keeper.report.pruned:
            raise LeanError(f'KernelPruningHook: no kernel in target={self.target!r} is zero, to be kept so. To prune, '
                            'give exactly one of amount, threshold and contrib.')
        return keeper

    def _backbone(self, model: nn.Module) -> TimmBackbone | None:
        """The backbone whose checkpoint has to tell that it is pruned."""
        backbone = getattr(model, 'backbone', None)
        inside = self.target == '' or self.target.split('.')[0] == 'backbone'
        return backbone if inside and isinstance(backbone, TimmBackbone) else None

    def _tell(self, logger: Any, report: KernelReport) -> None:
        """Log the share of zero kernels, of the target and of its parts; warn of a part that lost far more."""
        parts: dict[str, list[LayerReport]] = {}
        for layer in report.layers:
            parts.setdefault(layer.name.partition('.')[0], []).append(layer)
        shares = {name: sum(layer.pruned for layer in layers) / sum(layer.kernels for layer in layers)
                  for name, layers in parts.items()}
        logger.info(f'KernelPruningHook: {100 * report.share:.1f} % of the kernels are zero ('
                    + ', '.join(f'{name} {100 * share:.1f} %' for name, share in shares.items()) + ')')
        for name, share in shares.items():
            if 1 - share < (1 - report.share) / 2:
                logger.warning(
                    f'KernelPruningHook: {name} has lost {100 * share:.1f} % of its kernels, the whole target only '
                    f"{100 * report.share:.1f} %. scope='layer' takes the same share of every layer; target='backbone' "
                    'leaves neck and heads alone.')

    def _tell_detector(self, model: nn.Module) -> None:
        """Note on what the checkpoints are written from that kernels were pruned."""
        target, backbone = submodule(model, self.target, 'KernelPruningHook'), self._backbone(model)
        if backbone is not None:
            self._record(target, backbone)
        if backbone is None or target is model:
            self._record(target, model)

    def _record(self, source: nn.Module | None, target: nn.Module) -> None:
        for step in getattr(source, 'lean_steps', []):
            if step['op'] == STEP and not has_step(target, STEP):
                record_step(target, **step)
