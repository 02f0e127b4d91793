"""The frame of this package's own networks: a stem, stages that halve the resolution, a head.

A subclass builds the stages from timm's blocks; everything timm asks of a model besides is here.
"""
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import create_classifier, get_device_dtype
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices

from timm_lean.errors import LeanError

__all__ = ['MAX_STAGES', 'StagedNet', 'check_layers', 'small_image_cfg']

MAX_STAGES = 5


class StagedNet(nn.Module):
    """Convolutional network of up to five stages; from the second stage on each halves the resolution.

    Args:
        stages: The stages, each a sequence of blocks.
        widths: Channels of the stages' outputs.
        stem_width: Channels of the stem.
        stem_stride: 1 (a 3 x 3 convolution, for small images), 2 (the same with stride 2) or 4 (7 x 7 with stride 2
            and max pooling, for images of ImageNet's size).
        act_layer: Activation of stem and head.
        head_width: Channels of a 1 x 1 convolution behind the last stage; 0 for none.
        head_norm: Normalization and activation behind the last stage, for stages that end in neither.
        num_classes: Number of classes; 0 leaves out the classifier.
        in_chans: Number of input channels.
        global_pool: Global pooling type, '' for none.
        drop_rate: Dropout before the classifier.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        LeanError: An unknown stem stride.
    """

    def __init__(
            self,
            stages: Sequence[nn.Sequential],
            widths: Sequence[int],
            stem_width: int,
            stem_stride: int = 1,
            act_layer: type[nn.Module] = nn.ReLU,
            head_width: int = 0,
            head_norm: bool = False,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if stem_stride not in (1, 2, 4):
            raise LeanError(f'stem_stride must be 1, 2 or 4, got {stem_stride!r}.')
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        kernel, stride = (7, 2) if stem_stride == 4 else (3, stem_stride)
        self.conv1 = nn.Conv2d(in_chans, stem_width, kernel, stride=stride, padding=kernel // 2, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(stem_width, **dd)
        self.act1 = act_layer(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem_stride == 4 else nn.Identity()
        self.num_stages = len(stages)
        self.feature_info: list[dict[str, Any]] = [dict(num_chs=stem_width, reduction=stride, module='act1')]
        for i, (stage, width) in enumerate(zip(stages, widths, strict=True)):
            self.add_module(f'layer{i + 1}', stage)
            self.feature_info.append(dict(num_chs=width, reduction=stem_stride * 2 ** i, module=f'layer{i + 1}'))

        width = head_width or widths[-1]
        self.conv_head = nn.Conv2d(widths[-1], head_width, 1, bias=False, **dd) if head_width else nn.Identity()
        self.bn2 = nn.BatchNorm2d(width, **dd) if head_width or head_norm else nn.Identity()
        self.act2 = act_layer(inplace=True) if head_width or head_norm else nn.Identity()
        self.num_features = width
        self.global_pool, self.fc = create_classifier(width, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialize convolutions Kaiming normal, fan out (of one group)."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                fan_out = m.out_channels // m.groups * m.kernel_size[0] * m.kernel_size[1]
                nn.init.normal_(m.weight, std=math.sqrt(2) / math.sqrt(fan_out))
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def stages(self) -> list[nn.Sequential]:
        """The stages in order."""
        return [getattr(self, f'layer{i + 1}') for i in range(self.num_stages)]

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Forward pass that also returns the stem's and the stages' outputs.

        Args:
            x: Images `[B, C, H, W]`.
            indices: The last n outputs if an int, those listed if a list, all if None.
            norm: Unused, the features are final as they are.
            stop_early: Stop after the last output wanted.
            output_fmt: Only 'NCHW'.
            intermediates_only: Return the list alone.

        Returns:
            Final features and the list of intermediate ones, or the list alone.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(self.num_stages + 1, indices)
        intermediates = []
        x = self.act1(self.bn1(self.conv1(x)))
        if 0 in take_indices:
            intermediates.append(x)
        x = self.maxpool(x)
        last = max_index if stop_early else self.num_stages
        i = 0
        for name, stage in self.named_children():  # TorchScript unrolls this loop, not one over a list
            if name.startswith('layer') and i < last:
                i += 1
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint_seq(stage, x)
                else:
                    x = stage(x)
                if i in take_indices:
                    intermediates.append(x)
        if intermediates_only:
            return intermediates
        if last == self.num_stages:
            x = self.act2(self.bn2(self.conv_head(x)))
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove what is not needed for the given intermediate outputs; returns their indices."""
        take_indices, max_index = feature_take_indices(self.num_stages + 1, indices)
        prune_end = prune_norm or prune_head or max_index < self.num_stages
        for i in range(max_index, self.num_stages):
            setattr(self, f'layer{i + 1}', nn.Sequential())
        if max_index == 0:
            self.maxpool = nn.Identity()
        if prune_end:
            self.conv_head = self.bn2 = self.act2 = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, H, W]` to features before pooling."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.stages(), x, flatten=True)
        else:
            for name, stage in self.named_children():  # as in forward_intermediates
                if name.startswith('layer'):
                    x = stage(x)
        return self.act2(self.bn2(self.conv_head(x)))

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
            global_pool = self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **get_device_dtype(self))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features to logits `[B, num_classes]`, or to what the classifier would see."""
        x = self.global_pool(x)
        if self.drop_rate > 0.:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def check_layers(layers: Sequence[int], **others: Sequence[int] | int) -> None:
    """Raise a LeanError that names the value unless layers and what comes with them are counts that fit together.

    Args:
        layers: Blocks of each stage.
        **others: Counts, or sequences of one count per stage.
    """
    if isinstance(layers, (str, int)) or not 1 <= len(layers) <= MAX_STAGES:
        raise LeanError(f'layers must list the blocks of 1 to {MAX_STAGES} stages, got {layers!r}.')
    for name, value in {'layers': layers, **others}.items():
        if not isinstance(value, (list, tuple)):
            values: Sequence[Any] = [value]
        elif len(value) != len(layers):
            raise LeanError(f'{name}={list(value)} has {len(value)} entries for the {len(layers)} stages of '
                            f'layers={list(layers)}.')
        else:
            values = value
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values):
            raise LeanError(f'{name} must consist of whole numbers of at least 1, got {value!r}.')


def small_image_cfg(paper: str, num_classes: int = 10, pool_size: int = 8, **kwargs: Any) -> dict[str, Any]:
    """timm's default configuration of a network for 32 x 32 images, by default with ten classes.

    Args:
        paper: Its arXiv number.
        num_classes: Number of classes.
        pool_size: Side of the last feature maps in pixels.
        **kwargs: Further or other entries.
    """
    return {
        'url': '', 'num_classes': num_classes, 'input_size': (3, 32, 32), 'pool_size': (pool_size, pool_size),
        'crop_pct': 1.0, 'interpolation': 'bicubic',
        # per-channel statistics of the CIFAR-10 training images
        'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2470, 0.2435, 0.2616),
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0', 'paper_ids': f'arXiv:{paper}',
        **kwargs,
    }
