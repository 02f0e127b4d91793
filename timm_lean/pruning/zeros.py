"""Kernels that are zero stay zero: what a pruned model needs in any training.

A pruned kernel is one that is zero. There is no mask in the state dict and no wrapper around a layer: the zeros are the
mask, so a pruned model is copied, traced, averaged, wrapped and saved like any other. The price is that an optimizer
step revives them; so whoever trains lets them be zeroed again after every step.
"""
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn
from timm.utils import unwrap_model

from timm_lean.errors import LeanError
from timm_lean.layers.filter_banks import find_filter_banks

from .report import KernelReport, live_kernels, report_banks

__all__ = ['ZeroKeeper', 'keep_zeros', 'kernel_report']


def keep_zeros(model: nn.Module, optimizer: torch.optim.Optimizer, followers: Iterable[nn.Module] = ()) -> 'ZeroKeeper':
    """Let the kernels of a pruned model that are zero now stay zero through a training loop of your own.

        model = timm_lean.load_model('pruned.safetensors').train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        timm_lean.keep_zeros(model, optimizer)

    Args:
        model: The model, also compiled or in DDP.
        optimizer: After each of its steps the kernels are zeroed again, also if a GradScaler steps it.
        followers: Averages of the model (an EMA), in which the same kernels stay zero.

    Returns:
        The keeper: `.detach()` ends it, `.report` counts.

    Raises:
        LeanError: No kernel of the model is zero, or a follower is no copy of it.
    """
    keeper = ZeroKeeper(model)
    if not keeper.report.pruned:
        raise LeanError('keep_zeros() found no kernel that is zero. Prune the model before, or load a pruned one.')
    for follower in followers:
        keeper.follow(follower)
    keeper.attach(optimizer)
    return keeper


def kernel_report(model: nn.Module) -> KernelReport:
    """How many kernels of a model are zero, layer by layer."""
    model = unwrap_model(model)
    return report_banks(model, find_filter_banks(model, user='The report of kernels'))


class ZeroKeeper:
    """Keeps those kernels of a model at zero that are zero when it is made.

    Args:
        model: The model, on any device; of a wrapped one (DDP, torch.compile, EMA) the model inside.

    Attributes:
        updates: How often kernels were pruned since; a `KernelPruner` does that.

    Raises:
        LeanError: The model has no convolutions.
    """
    updates = 0

    def __init__(self, model: nn.Module):
        self.model = unwrap_model(model)
        self.banks = find_filter_banks(self.model, user='Kernel pruning')
        self._dead: dict[str, torch.Tensor] = {}
        self._followers: list[nn.Module] = []
        self._handle: Any = None
        self._dead_from_zeros()

    @property
    def report(self) -> KernelReport:
        """Zero kernels per layer, counted now."""
        return report_banks(self.model, self.banks)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Call `step()` by itself after every step of an optimizer, also if a GradScaler steps it."""
        self.detach()
        self._handle = optimizer.register_step_post_hook(lambda *args: self.step())

    def detach(self) -> None:
        """Undo `attach`."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def follow(self, model: nn.Module) -> None:
        """Keep the same kernels of a copy of the model at zero: an EMA of the weights forgets slowly, never fully."""
        model = unwrap_model(model)
        missing = {bank.name for bank in self.banks} - {name for name, _ in model.named_modules()}
        if missing:
            raise LeanError(f'The model to follow has no {sorted(missing)[0]!r}; give a copy of the pruned model.')
        self._followers.append(model)

    def set_progress(self, progress: float) -> bool:
        """Whether more kernels were pruned at this progress of the training: never, a `KernelPruner` does that."""
        return False

    @torch.no_grad()
    def step(self) -> None:
        """Zero the dead kernels again; to be called after every optimizer step (and update of an EMA)."""
        for model in (self.model, *self._followers):
            for name, dead in self._dead.items():
                weight = model.get_submodule(name).weight
                assert isinstance(weight, torch.Tensor)
                if dead.device != weight.device:
                    dead = self._dead[name] = dead.to(weight.device)
                weight.masked_fill_(dead[:, :, None, None], 0)

    def state_dict(self) -> dict[str, Any]:
        """Plain data to resume by. The masks are not in it: they are the zeros in the model's weights."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume, after the model's weights have been loaded."""
        self._dead_from_zeros()

    def _dead_from_zeros(self) -> None:
        banks = find_filter_banks(self.model)  # also those that a `KernelPruner` does not prune further
        self._dead = {bank.name: ~live_kernels(bank.weight) for bank in banks}
