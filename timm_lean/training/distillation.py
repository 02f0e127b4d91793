"""Feature distillation: timm's task, with regularizers and with teachers from this package's checkpoints.

The loss is `CE + weight * MSE(student, teacher)` over the pooled features before the classifier; a linear projection,
trained along, joins networks of different widths (`timm.task.FeatureDistillationTask`). The classes of the teacher
do not matter, only its features.
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.task import FeatureDistillationTask

from timm_lean.checkpoint.format import load_any
from timm_lean.errors import LeanError
from timm_lean.regularizers import Regularizer

from .data import model_data_config
from .task import WithRegularizers

__all__ = ['DistilledTask', 'load_teacher']


class DistilledTask(WithRegularizers, FeatureDistillationTask):
    """Feature distillation plus the weighted terms of regularizers.

    Args:
        model: The student.
        teacher: A network whose features the student learns to have; it is not changed.
        weight: Weight of the features' mean squared error beside the classification loss.
        img_size: Size of the images, in pixels.
        regularizers: Regularizers, in the order of their logs.
        device: Where both networks are.
        **kwargs: Arguments of timm's FeatureDistillationTask.

    Raises:
        LeanError: One of the networks gives no pooled features for such images.
    """

    def __init__(
            self,
            model: nn.Module,
            teacher: nn.Module,
            weight: float,
            img_size: int,
            regularizers: Sequence[Regularizer] = (),
            device: torch.device | None = None,
            **kwargs: Any,
    ):
        device = device if device is not None else torch.device('cpu')
        teacher = teacher.to(device).eval().requires_grad_(False)
        x = torch.zeros(1, model.in_chans, img_size, img_size, device=device)  # type: ignore[call-overload]
        # counted, not asked: attributes of pruned networks may still say the old width
        super().__init__(
            model, teacher, distill_loss_weight=weight, student_feature_dim=_feature_dim(model, x, 'The model'),
            teacher_feature_dim=_feature_dim(teacher, x, 'The teacher'), device=device, **kwargs)
        self.regularizers = list(regularizers)
        # timm takes them from pretrained_cfg, which has three channels also where the networks have one
        for network, holder, names in ((model, self, ('student_mean', 'student_std')),
                                       (teacher, self.teacher, ('mean_kd', 'std_kd'))):
            config = model_data_config(network)
            for name, values in zip(names, (config['mean'], config['std']), strict=True):
                setattr(holder, name, torch.tensor(values, device=device).view(1, -1, 1, 1))


def load_teacher(source: str) -> nn.Module:
    """A trained network: a checkpoint, `local-dir:DIR`, or a timm name with its pretrained weights (timm's download).

    Raises:
        LeanError: There is no such network, or no trained weights for it.
    """
    try:
        return load_any(source, pretrained=True)
    except LeanError as e:
        raise LeanError(f'--distill {source}: {e}') from e


@torch.no_grad()
def _feature_dim(model: nn.Module, x: torch.Tensor, who: str) -> int:
    """Width of the pooled features before the classifier."""
    training = model.training
    try:
        features = model.eval().forward_head(model.forward_features(x), pre_logits=True)  # type: ignore[operator]
    except Exception as e:  # whatever the network raises for images it does not take
        raise LeanError(f'{who} for --distill gives no features for images {list(x.shape[1:])}: '
                        f'{type(e).__name__}: {str(e)[:200]}') from e
    finally:
        model.train(training)
    if not isinstance(features, torch.Tensor) or features.ndim != 2:
        raise LeanError(f'{who} for --distill must give pooled features [B, C]; it has no pooling before its head.')
    return features.shape[1]
