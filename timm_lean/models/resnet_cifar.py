"""ResNets for 32 x 32 images, dense and with deeply shared filter bases.

Papers:
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385, section 4.2 (widths 16/32/64)
* `Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks`
  - https://arxiv.org/abs/2006.05066, tables 2 and 4

Two kinds: the thin networks for CIFAR-10 (three stages, parameter-free shortcuts) and ImageNet's ResNet-18/34 with a
3 x 3 stem and no pooling for CIFAR-100 (four stages, 1 x 1 convolution shortcuts).
"""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock

from timm_lean.sharing.fold import fold

from ._classifier import ClassifierNet
from ._sharing import check_ranks, share_filter_basis

__all__ = ['CifarResNet']


class ZeroPadShortcut(nn.Module):
    """Parameter-free shortcut: subsample, and pad the missing channels with zeros (option A of arXiv 1512.03385)."""

    def __init__(self, in_chs: int, out_chs: int, stride: int):
        super().__init__()
        self.stride = stride
        before = (out_chs - in_chs) // 2
        self.padding = (0, 0, 0, 0, before, out_chs - in_chs - before)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::self.stride, ::self.stride], self.padding)


class CifarResNet(ClassifierNet):
    """Residual network of basic blocks for small images; the stem does not reduce the resolution.

    Args:
        layers: Blocks in each stage.
        channels: Width of each stage.
        conv_shortcut: Shortcuts by 1 x 1 convolution and BN instead of zero padding.
        num_classes: Number of classes; 0 leaves out the classifier.
        in_chans: Number of input channels.
        global_pool: Global pooling type, '' for none.
        shared_rank: Shared filters in the first stage, doubled in each further one; None for the dense network.
        unique_rank: Unique filters of each convolution in the first stage, doubled likewise.
        dual: One basis for the first and one for the second convolution of the blocks.
        joint_init: Initialize dual bases of a stage jointly orthonormal.
        drop_rate: Dropout before the classifier.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
            self,
            layers: tuple[int, ...],
            channels: tuple[int, ...] = (16, 32, 64),
            conv_shortcut: bool = False,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            shared_rank: int | None = None,
            unique_rank: int | None = None,
            dual: bool = False,
            joint_init: bool = False,
            drop_rate: float = 0.,
            device: Any = None,
            dtype: torch.dtype | None = None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        width = channels[0]
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info: list[dict[str, Any]] = [dict(num_chs=width, reduction=1, module='act1')]

        self.stage_names = [f'layer{i + 1}' for i in range(len(layers))]
        for i, (name, depth, chs) in enumerate(zip(self.stage_names, layers, channels, strict=True)):
            blocks = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                downsample = None
                if stride != 1 or width != chs:
                    downsample = nn.Sequential(
                        nn.Conv2d(width, chs, 1, stride=stride, bias=False, **dd),
                        nn.BatchNorm2d(chs, **dd),
                    ) if conv_shortcut else ZeroPadShortcut(width, chs, stride)
                blocks.append(BasicBlock(width, chs, stride, downsample, **dd))
                width = chs
            setattr(self, name, nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=width, reduction=2 ** i, module=name))

        self.num_features = width
        self.global_pool, self.fc = create_classifier(width, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

        self.init_weights()
        if shared_rank is not None or unique_rank is not None:
            shared_rank, unique_rank = shared_rank or 0, unique_rank or 0
            check_ranks(shared_rank, unique_rank)
            share_filter_basis(self._stages(), shared_rank, unique_rank, dual=dual, joint_init=joint_init)

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Initialize convolutions Kaiming normal, fan out."""
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')

    fold = fold

    def _stages(self) -> list[nn.Sequential]:
        return [getattr(self, name) for name in self.stage_names]

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
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        x = self.act1(self.bn1(self.conv1(x)))
        if 0 in take_indices:
            intermediates.append(x)
        stages = self._stages()
        for i, stage in enumerate(stages[:max_index] if stop_early else stages, start=1):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Remove what is not needed for the given intermediate outputs; returns their indices."""
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        for name in self.stage_names[max_index:]:
            setattr(self, name, nn.Sequential())
        if max_index < len(self.stage_names):
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
            prune_head = True
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images `[B, C, H, W]` to features before pooling."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self._stages(), x, flatten=True)
        else:
            for name, stage in self.named_children():  # TorchScript unrolls this loop, not one over a list
                if name.startswith('layer'):
                    x = stage(x)
        return x


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    channels = kwargs['channels']
    return build_model_with_cfg(
        CifarResNet, variant, pretrained, feature_cfg=dict(out_indices=tuple(range(len(channels) + 1))), **kwargs)


def _thin(variant: str, pretrained: bool, depth: int, /, **kwargs: Any) -> CifarResNet:
    """Widths 16/32/64, depth 6n + 2, parameter-free shortcuts."""
    model_args = dict(layers=((depth - 2) // 6,) * 3, channels=(16, 32, 64), joint_init=True)
    return _create(variant, pretrained, **dict(model_args, **kwargs))


def _wide(variant: str, pretrained: bool, layers: tuple[int, ...], /, **kwargs: Any) -> CifarResNet:
    """Widths 64..512, 1 x 1 convolution shortcuts."""
    model_args = dict(layers=layers, channels=(64, 128, 256, 512), conv_shortcut=True)
    return _create(variant, pretrained, **dict(model_args, **kwargs))


def _cfg(num_classes: int = 10, pool_size: int = 8, **kwargs: Any) -> dict[str, Any]:
    return {
        'url': '', 'num_classes': num_classes, 'input_size': (3, 32, 32), 'pool_size': (pool_size, pool_size),
        'crop_pct': 1.0, 'interpolation': 'bicubic',
        # per-channel statistics of the CIFAR-10 training images
        'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2470, 0.2435, 0.2616),
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0', 'paper_ids': 'arXiv:2006.05066',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    **{name + '.untrained': _cfg() for name in (
        'resnet20_cifar', 'resnet32_cifar', 'resnet56_cifar', 'resnet110_cifar',
        'resnet32_cifar_s8u1', 'resnet32_cifar_s16u1', 'resnet32_cifar_s16u1_dual',
        'resnet56_cifar_s8u1', 'resnet56_cifar_s16u1', 'resnet56_cifar_s16u1_dual',
    )},
    **{name + '.untrained': _cfg(num_classes=100, pool_size=4) for name in (
        'resnet18_cifar', 'resnet34_cifar', 'resnet34_cifar_s8u1', 'resnet34_cifar_s16u1', 'resnet34_cifar_s32u1',
    )},
})


def _ranks(shared_rank: int, dual: bool, kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(dict(shared_rank=shared_rank, unique_rank=1, dual=dual), **kwargs)


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for 32 x 32 images, widths 16/32/64."""
    return _thin('resnet20_cifar', pretrained, 20, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 for 32 x 32 images, widths 16/32/64."""
    return _thin('resnet32_cifar', pretrained, 32, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for 32 x 32 images, widths 16/32/64."""
    return _thin('resnet56_cifar', pretrained, 56, **kwargs)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 for 32 x 32 images, widths 16/32/64."""
    return _thin('resnet110_cifar', pretrained, 110, **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-18 for 32 x 32 images, widths 64..512."""
    return _wide('resnet18_cifar', pretrained, (2, 2, 2, 2), **kwargs)


@register_model
def resnet34_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-34 for 32 x 32 images, widths 64..512."""
    return _wide('resnet34_cifar', pretrained, (3, 4, 6, 3), **kwargs)


@register_model
def resnet32_cifar_s8u1(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`resnet32_cifar` with one basis of 8 shared filters per stage (doubling) and 1 unique filter."""
    return _thin('resnet32_cifar_s8u1', pretrained, 32, **_ranks(8, False, kwargs))


@register_model
def resnet32_cifar_s16u1(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`resnet32_cifar` with one basis of 16 shared filters per stage (doubling) and 1 unique filter."""
    return _thin('resnet32_cifar_s16u1', pretrained, 32, **_ranks(16, False, kwargs))


@register_model
def resnet32_cifar_s16u1_dual(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`resnet32_cifar` with two bases of 16 shared filters per stage (doubling) and 1 unique filter."""
    return _thin('resnet32_cifar_s16u1_dual', pretrained, 32, **_ranks(16, True, kwargs))


@register_model
def resnet56_cifar_s8u1(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`resnet56_cifar` with one basis of 8 shared filters per stage (doubling) and 1 unique filter."""
    return _thin('resnet56_cifar_s8u1', pretrained, 56, **_ranks(8, False, kwargs))


@register_model
def resnet56_cifar_s16u1(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`resnet56_cifar` with one basis of 16 shared filters per stage (doubling) and 1 unique filter."""
    return _thin('resnet56_cifar_s16u1', pretrained, 56, **_ranks(16, False, kwargs))


@register_model
def resnet56_cifar_s16u1_dual(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`resnet56_cifar` with two bases of 16 shared filters per stage (doubling) and 1 unique filter."""
    return _thin('resnet56_cifar_s16u1_dual', pretrained, 56, **_ranks(16, True, kwargs))


@register_model
def resnet34_cifar_s8u1(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`resnet34_cifar` with one basis of 8 shared filters per stage (doubling) and 1 unique filter."""
    return _wide('resnet34_cifar_s8u1', pretrained, (3, 4, 6, 3), **_ranks(8, False, kwargs))


@register_model
def resnet34_cifar_s16u1(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`resnet34_cifar` with one basis of 16 shared filters per stage (doubling) and 1 unique filter."""
    return _wide('resnet34_cifar_s16u1', pretrained, (3, 4, 6, 3), **_ranks(16, False, kwargs))


@register_model
def resnet34_cifar_s32u1(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """`resnet34_cifar` with one basis of 32 shared filters per stage (doubling) and 1 unique filter."""
    return _wide('resnet34_cifar_s32u1', pretrained, (3, 4, 6, 3), **_ranks(32, False, kwargs))
