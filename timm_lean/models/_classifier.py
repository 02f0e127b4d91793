"""What timm asks of a classifier besides its features, for this package's own networks of conv1, bn1, stages and fc."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import create_classifier, get_device_dtype

__all__ = ['ClassifierNet']


class ClassifierNet(nn.Module):
    """Base of networks with `conv1`, `bn1`, stages `layer1`, ..., `global_pool` and `fc`.

    A subclass sets these, `num_features`, `head_hidden_size`, `drop_rate` and `grad_checkpointing`, and has
    `forward_features`.
    """
    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        return dict(stem=r'^conv1|bn1', blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory by recomputing the blocks' activations in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier module."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier; the pooling type is kept if `global_pool` is None."""
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type  # type: ignore[has-type]
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **get_device_dtype(self))  # type: ignore[arg-type]
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features to logits `[B, num_classes]`, or to what the classifier would see."""
        x = self.global_pool(x)
        if self.drop_rate > 0.:  # type: ignore[operator]
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)  # type: ignore[arg-type]
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))  # type: ignore[operator]
