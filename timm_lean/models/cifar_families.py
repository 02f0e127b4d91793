"""DenseNet121, ResNeXt50 and MobileNetV2 for 32 x 32 images, dense and with shared filter bases.

Paper: `Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks`
- https://arxiv.org/abs/2006.05066, tables 2 and 3 (CIFAR-100).

They differ from the ImageNet networks of the same names in the stem, which does not reduce the resolution. DenseNet has
neither batch norm nor pooling behind it; MobileNetV2's is a 1 x 1 convolution with bias and padding 1, so that its
feature maps are those of images larger by two pixels.
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def

from timm_lean.layers import FilterBasis, SharedBasisConv2d
from timm_lean.sharing.fold import fold

from ._sharing import check_ranks
from ._staged import small_image_cfg
from .lean_families import LeanDenseNet, LeanResNet
from .mobilenetv2 import SharedMobileNetV2

__all__ = ['CifarDenseNet', 'CifarMobileNetV2', 'CifarResNeXt']

_CARDINALITY = 32
_GROUP_WIDTH = 4  # filters in a group of a unique bank
_MOBILENET_STAGES = [
    ['ir_r1_k3_s1_e1_c16'],
    ['ir_r2_k3_s2_e6_c24'],
    ['ir_r3_k3_s2_e6_c32'],
    ['ir_r4_k3_s2_e6_c64'],
    ['ir_r3_k3_s1_e6_c96'],
    ['ir_r3_k3_s1_e6_c160'],
    ['ir_r1_k3_s1_e6_c320'],
]


class CifarDenseNet(LeanDenseNet):
    """DenseNet-BC whose 3 x 3 convolutions may use one basis per dense block.

    Args:
        layers: Dense layers in each stage.
        growth: Channels each layer adds.
        shared_rank: Shared filters of every stage (not doubled); None for the dense network.
        unique_rank: Unique filters of each layer.
        **kwargs: Arguments of `LeanDenseNet`.
    """

    fold = fold

    def __init__(
            self,
            layers: Sequence[int] = (6, 12, 24, 16),
            growth: int = 32,
            shared_rank: int | None = None,
            unique_rank: int | None = None,
            **kwargs: Any,
    ):
        super().__init__(layers, growth, **kwargs)
        self.add_module('bn1', nn.Identity())  # nothing behind the stem
        self.add_module('act1', nn.Identity())
        if shared_rank is not None or unique_rank is not None:
            check_ranks(shared_rank or 0, unique_rank or 0)
            for g, stage in enumerate(self.stages()):
                _share_dense_block(stage, g, shared_rank or 0, unique_rank or 0)


def _share_dense_block(stage: nn.Sequential, index: int, shared: int, unique: int) -> None:
    basis = None
    for layer in stage:
        old = getattr(layer, 'conv2', None)
        if not isinstance(old, nn.Conv2d):  # the transition
            continue
        dd: dict[str, Any] = {'device': old.weight.device, 'dtype': old.weight.dtype}
        if shared and basis is None:
            basis = FilterBasis(shared, old.in_channels, old.kernel_size[0], stage=index, kind='basis', **dd)
        layer.conv2 = SharedBasisConv2d(
            old.in_channels, old.out_channels, old.kernel_size[0], basis=basis, unique_rank=unique, **dd)


class CifarResNeXt(LeanResNet):
    """ResNeXt 32x4d whose grouped 3 x 3 convolutions may be [unique | shared] filters from the second block on.

    The last 1 x 1 convolution of the block, behind batch norm and ReLU, acts as the coefficients.

    Args:
        layers: Blocks in each stage.
        widths: Channels of each stage's output.
        shared_rank: Shared filters in the first stage, doubled in each further one; None for the dense network.
        unique_rank: Unique filters of each block in the first stage, doubled likewise; groups of 4 filters.
        shared_groups: Groups of the shared filters.
        **kwargs: Arguments of `LeanResNet`.
    """

    def __init__(
            self,
            layers: Sequence[int] = (3, 4, 6, 3),
            widths: Sequence[int] = (256, 512, 1024, 2048),
            shared_rank: int | None = None,
            unique_rank: int | None = None,
            shared_groups: int = 16,
            **kwargs: Any,
    ):
        super().__init__(layers, widths, cardinality=_CARDINALITY, **kwargs)
        if shared_rank is not None or unique_rank is not None:
            check_ranks(shared_rank or 0, unique_rank or 0)
            for g, stage in enumerate(self.stages()):
                _share_grouped(stage, g, (shared_rank or 0) * 2 ** g, (unique_rank or 0) * 2 ** g, shared_groups)


def _share_grouped(stage: nn.Sequential, index: int, shared: int, unique: int, groups: int) -> None:
    basis = None
    blocks: list[Any] = list(stage)[1:]
    for block in blocks:
        conv, last = block.conv2, block.conv3
        dd: dict[str, Any] = {'device': conv.weight.device, 'dtype': conv.weight.dtype}
        if shared and basis is None:
            basis = FilterBasis(
                shared, conv.in_channels, conv.kernel_size[0], groups=groups, stage=index, kind='basis', **dd)
        rank = shared + unique
        block.conv2 = SharedBasisConv2d(
            conv.in_channels, rank, conv.kernel_size[0], basis=basis, unique_rank=unique,
            unique_groups=max(unique // _GROUP_WIDTH, 1), coefficients=False, norm_layer=None, **dd)
        block.bn2 = nn.BatchNorm2d(rank, **dd)
        block.conv3 = nn.Conv2d(rank, last.out_channels, 1, bias=False, **dd)
        nn.init.normal_(block.conv3.weight, std=(2 / last.out_channels) ** 0.5)  # Kaiming, fan out


class _WidthShortcut(nn.Module):
    """A block of stride 1 that changes the width, with a 1 x 1 convolution and BN as its shortcut."""

    def __init__(self, block: nn.Module, in_chs: int, out_chs: int, **dd: Any):
        super().__init__()
        self.block = block
        conv = nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd)
        nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
        self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out_chs, **dd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x) + self.shortcut(x)


class CifarMobileNetV2(SharedMobileNetV2):
    """MobileNetV2 for small images; images `[B, C, H, W]` give maps of `ceil((H + 2) / reduction)` pixels.

    Args:
        shared_convs: Names of the shared convolutions of a block: `conv_pw` (expansion), `conv_pwl` (projection).
        **kwargs: Arguments of `SharedMobileNetV2`.
    """

    def __init__(self, shared_convs: tuple[str, ...] = (), **kwargs: Any):
        super().__init__(
            shared_convs=shared_convs, **dict(dict(block_args=decode_arch_def(_MOBILENET_STAGES)), **kwargs))
        old: Any = self.conv_stem
        dd: dict[str, Any] = {'device': old.weight.device, 'dtype': old.weight.dtype}
        self.conv_stem = nn.Conv2d(old.in_channels, old.out_channels, 1, padding=1, **dd)
        nn.init.kaiming_normal_(self.conv_stem.weight, mode='fan_out', nonlinearity='relu')
        assert self.conv_stem.bias is not None
        nn.init.zeros_(self.conv_stem.bias)
        stages: Any = self.blocks
        for stage in stages:
            block = stage[0]
            in_chs, out_chs = block.conv_pw.in_channels, block.conv_pwl.out_channels
            if block.conv_dw.stride == (1, 1) and in_chs != out_chs:
                stage[0] = _WidthShortcut(block, in_chs, out_chs, **dd)
        for info in self.feature_info:  # timm counts its own stem's stride of 2
            info['reduction'] //= 2


def _cfg(pool_size: int, **kwargs: Any) -> dict[str, Any]:
    return small_image_cfg('2006.05066', num_classes=100, pool_size=pool_size, **kwargs)


default_cfgs = generate_default_cfgs({
    **{name + '.untrained': _cfg(4) for name in (
        'densenet121_cifar', 'densenet121_cifar_s64u4', 'resnext50_cifar', 'resnext50_cifar_s16u1')},
    **{name + '.untrained': _cfg(5, first_conv='conv_stem', classifier='classifier') for name in (
        'mobilenetv2_cifar', 'mobilenetv2_cifar_shared', 'mobilenetv2_cifar_sharedpp')},
})


def _create(cls: Any, variant: str, pretrained: bool, **kwargs: Any) -> Any:
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg=dict(out_indices=(0, 1, 2, 3, 4)), **kwargs)


def _mobilenet(variant: str, pretrained: bool, shared_convs: tuple[str, ...], /, **kwargs: Any) -> CifarMobileNetV2:
    return build_model_with_cfg(
        CifarMobileNetV2, variant, pretrained,
        feature_cfg=dict(flatten_sequential=True, out_indices=(0, 1, 2, 3)),
        **dict(dict(shared_convs=shared_convs), **kwargs))


@register_model
def densenet121_cifar(pretrained: bool = False, **kwargs: Any) -> CifarDenseNet:
    """DenseNet121 (growth 32) for 32 x 32 images."""
    return _create(CifarDenseNet, 'densenet121_cifar', pretrained, **kwargs)


@register_model
def densenet121_cifar_s64u4(pretrained: bool = False, **kwargs: Any) -> CifarDenseNet:
    """`densenet121_cifar` with one basis of 64 shared filters per dense block and 4 unique filters per layer."""
    ranks = dict(shared_rank=64, unique_rank=4)
    return _create(CifarDenseNet, 'densenet121_cifar_s64u4', pretrained, **dict(ranks, **kwargs))


@register_model
def resnext50_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNeXt:
    """ResNeXt50 32x4d for 32 x 32 images."""
    return _create(CifarResNeXt, 'resnext50_cifar', pretrained, **kwargs)


@register_model
def resnext50_cifar_s16u1(pretrained: bool = False, **kwargs: Any) -> CifarResNeXt:
    """`resnext50_cifar` with 16 groups of 4 shared filters per stage (doubling) and 1 group of unique ones."""
    ranks = dict(shared_rank=64, unique_rank=4)
    return _create(CifarResNeXt, 'resnext50_cifar_s16u1', pretrained, **dict(ranks, **kwargs))


@register_model
def mobilenetv2_cifar(pretrained: bool = False, **kwargs: Any) -> CifarMobileNetV2:
    """MobileNetV2 for 32 x 32 images."""
    return _mobilenet('mobilenetv2_cifar', pretrained, (), **kwargs)


@register_model
def mobilenetv2_cifar_shared(pretrained: bool = False, **kwargs: Any) -> CifarMobileNetV2:
    """`mobilenetv2_cifar` that shares the 1 x 1 expansions in the stages of width 32, 64, 96 and 160 ("Shared")."""
    return _mobilenet('mobilenetv2_cifar_shared', pretrained, ('conv_pw',), **kwargs)


@register_model
def mobilenetv2_cifar_sharedpp(pretrained: bool = False, **kwargs: Any) -> CifarMobileNetV2:
    """`mobilenetv2_cifar_shared` that also shares the projections ("Shared++"); without attention."""
    return _mobilenet('mobilenetv2_cifar_sharedpp', pretrained, ('conv_pw', 'conv_pwl'), **kwargs)
