"""timm's classification task with regularizers added to its loss."""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.task import ClassificationTask, TrainingTask
from timm.utils import unwrap_model

from timm_lean.regularizers import Regularizer, loss_terms

__all__ = ['RegularizedTask', 'WithRegularizers']


class WithRegularizers(TrainingTask):
    """Mixin, before a timm task: adds the weighted terms of `self.regularizers` to the task's loss.

    The result has, besides the task's own entries, `loss_<name>` and `<name>` for each regularizer.
    """
    regularizers: list[Regularizer]

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        result = super().forward(input, target)
        terms = loss_terms(self.regularizers, unwrap_model(self.get_eval_model()))
        for name, value in terms.items():
            if name.startswith('loss_'):
                result['loss'] = result['loss'] + value
        return {**result, **{name: value.detach() for name, value in terms.items()}}


class RegularizedTask(WithRegularizers, ClassificationTask):
    """Classification loss plus the weighted terms of regularizers.

    Args:
        model: The model to train.
        regularizers: Regularizers, in the order of their logs.
        **kwargs: Arguments of timm's ClassificationTask.
    """

    def __init__(self, model: nn.Module, regularizers: Sequence[Regularizer] = (), **kwargs: Any):
        super().__init__(model, **kwargs)
        self.regularizers = list(regularizers)
