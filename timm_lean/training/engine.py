"""The classification training run, built on timm.task and timm's factories."""
import contextlib
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
import yaml
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import NativeScaler, dispatch_clip_grad, distribute_bn, unwrap_model

from timm_lean.checkpoint.files import atomic_file, lock_dir
from timm_lean.checkpoint.format import load_any, save_model, set_head
from timm_lean.checkpoint.recipe import recipe_of
from timm_lean.errors import LeanError
from timm_lean.regularizers import Regularizer, initialize_conv_similarity, parse_regularizer

from .config import TrainConfig
from .data import class_names, create_eval_loader, create_train_loader, model_data_config, open_dataset, seed_epoch
from .device import autocast, check_compiler, lost_processes, start_distributed
from .distillation import DistilledTask, load_teacher
from .evaluate import evaluate
from .log import RunLog
from .pruning import create_pruner
from .run_dir import choose_directory
from .state import load_state, restoring, save_state
from .task import RegularizedTask

__all__ = ['Trainer', 'train']

_LOG_INTERVAL = 20  # steps between looks at the loss; each look waits for the device


def train(config: TrainConfig) -> dict[str, Any]:
    """Train a model as configured; see `TrainConfig`.

    Returns:
        `output` (the run's folder), `best_top1`, `best_epoch` and the last epoch's row.

    Raises:
        LeanError: The configuration cannot be met.
    """
    device, rank, world = start_distributed(config.device)
    try:
        with lost_processes(world):
            return Trainer(config, device, rank, world).fit()
    finally:
        if world > 1:
            dist.destroy_process_group()


class Trainer:
    """One training run.

    Args:
        config: The settings.
        device: Where to train.
        rank: Number of this process.
        world: Number of processes.
    """

    def __init__(self, config: TrainConfig, device: torch.device, rank: int = 0, world: int = 1):
        self.config, self.device, self.rank, self.world = config, device, rank, world
        if config.compile:
            check_compiler(device)
        regularizers = [parse_regularizer(spec) for spec in config.reg]
        seed_epoch(config.seed, 0)
        model = load_any(
            config.model, pretrained=config.pretrained, num_classes=config.num_classes, **config.model_args)
        self.data_config = model_data_config(model, config.img_size)
        classes = self._open_data()
        self._prepare_model(model, classes, regularizers)
        self._prepare_task(regularizers)
        self._prepare_optimization()
        self._files = contextlib.ExitStack()  # the lock on the run's folder
        self.directory = self._open_directory()
        self.log = RunLog(self.directory, primary=rank == 0)
        self.start_epoch, self.best, self.updates = 0, {'top1': -1., 'epoch': 0.}, 0
        resumed = config.resume and self._resume()
        if config.init and not resumed:
            self._initialize()
        if config.compile:
            self.task.compile()
        if world > 1:
            self.task.prepare_distributed(device_ids=[device.index] if device.type == 'cuda' else None)

    def _open_data(self) -> list[str]:
        """Open both splits; returns the names of their classes."""
        config = self.config
        channels, *_, size = self.data_config['input_size']
        train_set = open_dataset(config.data, config.data_dir, 'train', channels, size, limit=config.train_images)
        eval_set = open_dataset(config.data, config.data_dir, 'eval', channels, size)
        classes = class_names(train_set)
        if class_names(eval_set) != classes:
            raise LeanError(f'Training and evaluation folders have different classes: {classes[:5]} ... and '
                            f'{class_names(eval_set)[:5]} ...')
        if config.num_classes is not None and config.num_classes < len(classes):
            raise LeanError(f'num_classes={config.num_classes}, but the data has {len(classes)} classes.')
        self.train_loader = create_train_loader(
            train_set, config, self.data_config, self.device, self.rank, self.world)
        self.eval_loader = create_eval_loader(
            eval_set, self.data_config, config.batch_size, self.device, config.workers, config.cache, self.rank,
            self.world)
        return classes

    def _prepare_model(self, model: nn.Module, classes: list[str], regularizers: list[Regularizer]) -> None:
        """Give a model its head and its pruner and move it to the device."""
        set_head(model, self.config.num_classes or len(classes))
        _describe(model, self.data_config, classes)
        for regularizer in regularizers:
            regularizer.raw(model)  # fails before anything is written if the model has nothing to act on
        self.pruner = create_pruner(model, self.config)
        self.model = model.to(self.device).train()
        if self.config.channels_last:
            to: Any = self.model.to  # torch before 2.14 has no type for memory_format
            to(memory_format=torch.channels_last)
        self.recipe = asdict(recipe_of(model))

    def _prepare_task(self, regularizers: list[Regularizer]) -> None:
        """The loss of a batch, its mixing, and the average of the weights."""
        config = self.config
        mixing = config.mixup > 0 or config.cutmix > 0
        self.mixup = Mixup(
            config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=self.model.num_classes,
        ) if mixing else None
        options: dict[str, Any] = dict(
            device=self.device, verbose=False,
            criterion_kwargs=dict(soft_targets=True) if mixing else dict(smoothing=config.smoothing))
        self.task: RegularizedTask | DistilledTask = DistilledTask(
            self.model, load_teacher(config.distill), config.distill_weight, self.data_config['input_size'][-1],
            regularizers, **options,
        ) if config.distill else RegularizedTask(self.model, regularizers, **options)
        if config.ema:
            self.task.setup_ema(decay=config.ema_decay, use_warmup=True)
            if self.pruner is not None:
                self.pruner.follow(unwrap_model(self.task.get_eval_model(ema=True)))

    def _prepare_optimization(self) -> None:
        """Optimizer, its schedule, and the scaler that float16 needs."""
        config = self.config
        trainable = self.task.get_trainable_module()
        assert trainable is not None
        try:
            self.optimizer = create_optimizer_v2(
                trainable, opt=config.opt, lr=config.lr, weight_decay=config.weight_decay,
                momentum=config.momentum, filter_bias_and_bn=not config.decay_all)
        except (ValueError, TypeError, AssertionError, ImportError) as e:
            raise LeanError(f'timm cannot create the optimizer {config.opt!r}: {e}') from e
        self.scaler = NativeScaler(device=self.device.type) if config.amp == 'fp16' else None
        self.updates_per_epoch = math.ceil(len(self.train_loader) / config.grad_accum)
        # stepped by update, not by epoch: a one-epoch warm-up would otherwise train that epoch at almost nothing
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched=config.sched, num_epochs=config.epochs, decay_milestones=config.milestones,
            decay_rate=config.decay_rate, min_lr=config.min_lr, warmup_epochs=config.warmup_epochs,
            step_on_epochs=False, updates_per_epoch=self.updates_per_epoch)

    def fit(self) -> dict[str, Any]:
        """Train the remaining epochs."""
        with self._files:
            for epoch in range(self.start_epoch, self.config.epochs):
                self._fit_epoch(epoch)
            self.log.close()
        last = self.log.rows[-1] if self.log.rows else {}
        return {'output': str(self.directory), 'best_top1': self.best['top1'],
                'best_epoch': int(self.best['epoch']), 'last': last}

    def _fit_epoch(self, epoch: int) -> None:
        """Train, evaluate and save once."""
        row = {'epoch': float(epoch + 1), **self._train_epoch(epoch)}
        ema = self.task.has_ema()
        if self.world > 1:
            distribute_bn(self.model, self.world, reduce=True)
        model = self.task.get_eval_model(ema=ema)
        assert model is not None
        metrics = evaluate(model, self.eval_loader, self.device, self.config.amp, self.world > 1)
        row.update({f'eval_{name}': metrics[name] for name in ('loss', 'top1', 'top5')})
        self.log.add(row, self.config.epochs)
        improved = metrics['top1'] > self.best['top1']
        if improved:
            self.best = {'top1': metrics['top1'], 'epoch': float(epoch + 1)}
        if self.rank == 0:
            self._save(epoch, improved, ema)
        if self.world > 1:
            dist.barrier()

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        config, task = self.config, self.task
        seed_epoch(config.seed, epoch + 1, self.rank if not config.cache else 0)
        self.scheduler.step_update(self.updates)
        if self.world > 1 and hasattr(getattr(self.train_loader, 'sampler', None), 'set_epoch'):
            self.train_loader.sampler.set_epoch(epoch)
        task.train()
        start, images, steps = time.perf_counter(), 0, len(self.train_loader)
        sums: dict[str, torch.Tensor] = {'correct': torch.zeros((), device=self.device)}
        means: dict[str, float] = {}
        self.optimizer.zero_grad()
        with self.log.bar(steps, epoch, config.epochs) as bar:
            for step, (x, target) in enumerate(self.train_loader):
                # the last group of an epoch may be shorter; it is averaged over what it has
                group_start = step - step % config.grad_accum
                group = min(config.grad_accum, steps - group_start)
                result = self._step(x, target, group, update=step + 1 == group_start + group)
                for name, value in result.items():
                    if name != 'output':
                        sums[name] = sums.get(name, 0) + value.detach()
                sums['correct'] += (result['output'].detach().argmax(1) == target).sum()
                images += len(x)
                if step % _LOG_INTERVAL == 0 or step + 1 == steps:
                    means = _means(sums, step + 1, images)
                    self._check_finite(means['loss'], epoch)
                    bar.set_postfix({
                        **{name: f'{value:.4g}' for name, value in means.items()},
                        'lr': f'{self.optimizer.param_groups[0]["lr"]:.3g}',
                        'img/s': f'{images * self.world / (time.perf_counter() - start):.0f}'}, refresh=False)
                bar.update()
        seconds = time.perf_counter() - start
        pruned = {} if self.pruner is None else {'pruned': 100 * self.pruner.report.share}
        top1 = means.pop('top1')
        return {
            'lr': self.optimizer.param_groups[0]['lr'],
            **{f'train_{name}': value for name, value in means.items()},
            'train_top1': top1,
            **pruned,
            'images_per_second': images * self.world / seconds,
            'seconds': seconds,
        }

    def _step(self, x: torch.Tensor, target: torch.Tensor, group: int, update: bool) -> dict[str, torch.Tensor]:
        """One forward and backward pass; an optimizer step if `update`."""
        config, task = self.config, self.task
        if config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.mixup is not None:
            x, target = self.mixup(x, target)
        for regularizer in task.regularizers:
            regularizer.set_progress(self.updates / (self.updates_per_epoch * config.epochs))
        progress = self.updates if config.prune.steps else self.updates / self.updates_per_epoch
        if self.pruner is not None and self.pruner.set_progress(progress):
            self.best = {'top1': -1., 'epoch': 0.}  # the best network is one that is as small as this one
        with contextlib.nullcontext() if update else task.no_sync():
            with autocast(self.device, config.amp):
                result = task(x, target)
            loss = result['loss'] / group
            if self.scaler is not None:
                self.scaler(loss, self.optimizer, clip_grad=config.clip_grad,
                            parameters=list(task.get_clip_parameters()), need_update=update)
            else:
                loss.backward()
                if update:
                    if config.clip_grad is not None:
                        dispatch_clip_grad(task.get_clip_parameters(), config.clip_grad)
                    self.optimizer.step()
        if update:
            self.optimizer.zero_grad()
            self.updates += 1
            self.scheduler.step_update(self.updates)
            task.update_ema(step=self.updates)
            if self.pruner is not None:
                self.pruner.step()
        return result

    def _check_finite(self, loss: float, epoch: int) -> None:
        if not math.isfinite(loss) and self.scaler is None:
            raise LeanError(f'The loss is {loss} in epoch {epoch + 1}. Lower --lr, add --warmup-epochs or '
                            '--clip-grad. The last completed save is kept.')

    def _save(self, epoch: int, improved: bool, ema: bool) -> None:
        model = unwrap_model(self.task.get_eval_model(ema=ema))
        save_model(model, self.directory / 'last.safetensors')
        if improved:
            save_model(model, self.directory / 'best.safetensors')
        save_state(self.directory, {  # last: what it refers to is on disk by now
            'recipe': self.recipe, 'epoch': epoch + 1, 'best': self.best, 'rows': self.log.rows,
            'updates': self.updates, 'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict() if self.scaler is not None else None,
            'pruner': self.pruner.state_dict() if self.pruner is not None else None,
            **self.task.get_checkpoint_state(),
            **(self.task.get_checkpoint_state(ema=True) if ema else {})})

    def _initialize(self) -> None:
        show = self.rank == 0 and sys.stderr.isatty()
        trace = initialize_conv_similarity(self.model, self.config.init_steps, progress=show)
        ema = self.task.get_trainable_module(ema=True)
        if ema is not None:
            ema.set(self.task.get_trainable_module())  # type: ignore[operator]
        self._say(f'conv_similarity initialization: {trace[0]:.4g} -> {trace[-1]:.4g} in {len(trace) - 1} steps')

    def _resume(self) -> bool:
        """Continue after the last completed save; False if there is none."""
        state = load_state(self.directory, self.recipe)
        if state is None:
            self._say(f'{self.directory} has no completed save yet: starting from the beginning.')
            return False
        if ('task_state' in state) != bool(self.task.get_task_state()):
            raise LeanError(f'{self.directory} was trained with another --distill. Resume with the same.')
        with restoring(self.directory):
            self.task.load_checkpoint_state(state['state_dict'], state.get('task_state'))
            if self.task.has_ema():
                if 'state_dict_ema' not in state:
                    raise LeanError(f'{self.directory} was trained without --ema. Resume without it.')
                self.task.load_checkpoint_state(state['state_dict_ema'], state.get('task_state_ema'), ema=True)
            self.optimizer.load_state_dict(state['optimizer'])
            if self.scaler is not None and state['scaler'] is not None:
                self.scaler.load_state_dict(state['scaler'])
            if self.pruner is not None and state['pruner'] is not None:
                self.pruner.load_state_dict(state['pruner'])
        self.start_epoch, self.best, self.updates = state['epoch'], state['best'], state['updates']
        self.log.rows = state['rows']
        if self.rank == 0:
            self.log.write_csv()
        self._say(f'Resuming {self.directory} after epoch {self.start_epoch}.')
        return True

    def _open_directory(self) -> Path:
        directory = choose_directory(self.config)
        if self.world > 1:
            dist.barrier()  # every process has looked before the first one writes
        if self.rank == 0:
            self._files.enter_context(lock_dir(directory))
            with atomic_file(directory / 'args.yaml') as temporary:
                temporary.write_text(yaml.safe_dump(self.config.rerun_args(), sort_keys=False))
        return directory

    def _say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


def _describe(model: nn.Module, data_config: dict[str, Any], classes: list[str]) -> None:
    """Note on the model what it is trained with, so that its checkpoint says how to use it."""
    cfg = {
        **model.pretrained_cfg,  # type: ignore[dict-item]
        **{k: data_config[k] for k in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')},
        'num_classes': model.num_classes, 'label_names': classes,
    }
    model.pretrained_cfg = model.default_cfg = cfg  # type: ignore[assignment]


def _means(sums: dict[str, torch.Tensor], steps: int, images: int) -> dict[str, float]:
    """Means over the steps, and 'top1' in percent for the sum 'correct'; waits for the device once."""
    values = dict(zip(sums, torch.stack([value.float() for value in sums.values()]).tolist(), strict=True))
    top1 = 100 * values.pop('correct') / images
    return {**{name: value / steps for name, value in values.items()}, 'top1': top1}
