"""timm's classification task with regularizers added to its loss."""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.task import ClassificationTask
from timm.utils import unwrap_model

from timm_lean.regularizers import Regularizer, loss_terms

__all__ = ['RegularizedTask']


class RegularizedTask(ClassificationTask):
    """Classification loss plus the weighted terms of regularizers.

    The result has, besides timm's `loss` and `output`, `loss_<name>` and `<name>` for each regularizer.

    Args:
        model: The model to train.
        regularizers: Regularizers, in the order of their logs.
        **kwargs: Arguments of timm's ClassificationTask.
    """

    def __init__(self, model: nn.Module, regularizers: Sequence[Regularizer] = (), **kwargs: Any):
        super().__init__(model, **kwargs)
        self.regularizers = list(regularizers)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        result = super().forward(input, target)
        terms = loss_terms(self.regularizers, unwrap_model(self.trainable_module))
        for name, value in terms.items():
            if name.startswith('loss_'):
                result['loss'] = result['loss'] + value
        return {**result, **{name: value.detach() for name, value in terms.items()}}
