"""Families of networks whose depth and width are arguments: ResNet, ResNeXt, shared-basis ResNet, DenseNet,
EfficientNet and MobileNetV2 on timm's blocks.

    timm.create_model('lean_resnet', layers=(3, 3, 3), widths=(32, 64, 128))

They are what `timm_lean.depth.bounded_model` chooses from. The source of the idea, https://arxiv.org/abs/2106.14190,
makes published families shallower and wider; these are such families with both left open.
"""
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
from timm.models.densenet import DenseLayer, DenseTransition
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv

from timm_lean.errors import LeanError
from timm_lean.sharing.fold import fold

from ._sharing import share_filter_basis
from ._staged import StagedNet, check_layers, small_image_cfg

__all__ = ['LeanDenseNet', 'LeanMobileNet', 'LeanResNet']


class ZeroPadShortcut(nn.Module):
    """Parameter-free shortcut: subsample, and pad the missing channels with zeros.

    Option A of https://arxiv.org/abs/1512.03385.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int):
        super().__init__()
        self.stride = stride
        before = (out_chs - in_chs) // 2
        self.padding = (0, 0, 0, 0, before, out_chs - in_chs - before)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::self.stride, ::self.stride], self.padding)


class LeanResNet(StagedNet):
    """Residual network of any depth and width.

    Args:
        layers: Blocks in each stage.
        widths: Channels of each stage's output.
        stem_width: Channels of the stem; the first of `widths` if 0, at most 64.
        cardinality: Groups of the 3 x 3 convolutions of ResNeXt's bottleneck blocks, whose inner width is half their
            output; 0 for basic blocks of two 3 x 3 convolutions.
        conv_shortcut: Shortcuts by 1 x 1 convolution and BN; if False they pad with zeros and have no parameters.
        shared_rank: Shared filters in the first stage, doubled in each further one; None for the dense network.
        unique_rank: Unique filters of each convolution in the first stage, doubled likewise.
        dual: One basis for the first and one for the second convolution of the blocks.
        **kwargs: Arguments of `StagedNet`.

    Raises:
        LeanError: Layers, widths or ranks that do not fit together.
    """

    fold = fold

    def __init__(
            self,
            layers: Sequence[int],
            widths: Sequence[int],
            stem_width: int = 0,
            cardinality: int = 0,
            conv_shortcut: bool = True,
            shared_rank: int | None = None,
            unique_rank: int | None = None,
            dual: bool = False,
            device: Any = None,
            dtype: torch.dtype | None = None,
            **kwargs: Any,
    ):
        check_layers(layers, widths=widths)
        dd = {'device': device, 'dtype': dtype}
        if cardinality:
            # a bottleneck's inner width is half its output; timm wants it as planes x base_width / 64 x cardinality
            if wrong := [w for w in widths if w % 4 or (w // 2) % cardinality]:
                raise LeanError(f'The width {wrong[0]} must be a multiple of 4, and its half of '
                                f'cardinality={cardinality}.')
            if shared_rank or unique_rank:
                raise LeanError('shared_rank and unique_rank are for basic blocks; leave out cardinality.')
        chs = stem_width = stem_width or min(widths[0], 64)
        stages = []
        for i, (depth, width) in enumerate(zip(layers, widths, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                downsample: nn.Module | None = None
                if stride != 1 or chs != width:
                    downsample = downsample_conv(chs, width, 1, stride=stride, **dd) if conv_shortcut else \
                        ZeroPadShortcut(chs, width, stride)
                if cardinality:
                    block: nn.Module = _bottleneck(chs, width, stride, downsample, cardinality, dd)
                else:
                    block = BasicBlock(chs, width, stride, downsample, **dd)
                blocks.append(block)
                chs = width
            stages.append(nn.Sequential(*blocks))
        super().__init__(stages, widths, stem_width, device=device, dtype=dtype, **kwargs)
        if shared_rank is not None or unique_rank is not None:
            share_filter_basis(self.stages(), shared_rank or 0, unique_rank or 0, dual=dual)


def _bottleneck(
        chs: int, width: int, stride: int, downsample: nn.Module | None, cardinality: int, dd: dict[str, Any],
) -> nn.Module:
    planes, group = width // 4, width // 2 // cardinality
    # timm's width of a group is floor(planes x base_width / 64): the half keeps rounding away from the edge
    base_width: Any = 64 * (group + 0.5) / planes
    return Bottleneck(chs, planes, stride, downsample, cardinality=cardinality, base_width=base_width, **dd)


class _DenseStep(DenseLayer):
    """timm's dense layer followed by the concatenation with its input `[B, C, H, W]` -> `[B, C + growth, H, W]`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        new = self.conv2(self.norm2(self.conv1(self.norm1(x))))  # type: ignore[operator]
        return torch.cat([x, new], 1)


class LeanDenseNet(StagedNet):
    """DenseNet-BC of any depth and growth; a stage starts with the transition from the one before.

    Args:
        layers: Dense layers (1 x 1 and 3 x 3 convolution) in each stage.
        growth: Channels each layer adds.
        bn_size: Channels of a layer's 1 x 1 convolution, in units of `growth`.
        transition_act: Keep the ReLU between a transition's batch norm and its convolution.
        **kwargs: Arguments of `StagedNet`.
    """

    def __init__(
            self,
            layers: Sequence[int],
            growth: int,
            bn_size: int = 4,
            transition_act: bool = True,
            device: Any = None,
            dtype: torch.dtype | None = None,
            **kwargs: Any,
    ):
        check_layers(layers, growth=growth, bn_size=bn_size)
        dd = {'device': device, 'dtype': dtype}
        chs = stem_width = 2 * growth
        stages, widths = [], []
        for i, depth in enumerate(layers):
            blocks: list[nn.Module] = []
            if i > 0:
                norm_layer: Any = partial(BatchNormAct2d, apply_act=transition_act)
                blocks.append(DenseTransition(chs, chs // 2, norm_layer=norm_layer, **dd))
                chs //= 2
            for _ in range(depth):
                blocks.append(_DenseStep(chs, growth, bn_size, **dd))
                chs += growth
            stages.append(nn.Sequential(*blocks))
            widths.append(chs)
        super().__init__(stages, widths, stem_width, head_norm=True, device=device, dtype=dtype, **kwargs)


class LeanMobileNet(StagedNet):
    """Inverted residual blocks of any depth and width: MobileNetV2, and EfficientNet with attention and SiLU.

    As in both, the first stage has no expansion and a 1 x 1 convolution precedes the pooling.

    Args:
        layers: Blocks in each stage.
        widths: Channels of each stage's output.
        stem_width: Channels of the stem; twice the first of `widths` if 0.
        head_width: Channels of the last 1 x 1 convolution; four times the last of `widths` if 0.
        expansion: Width inside a block in units of its input, from the second stage on.
        kernel_size: Side of the depthwise kernels.
        se_ratio: Width of the channel attention in units of a block's input; 0 for none.
        act: 'relu6' or 'silu'.
        **kwargs: Arguments of `StagedNet`.
    """

    def __init__(
            self,
            layers: Sequence[int],
            widths: Sequence[int],
            stem_width: int = 0,
            head_width: int = 0,
            expansion: int = 6,
            kernel_size: int = 3,
            se_ratio: float = 0.,
            act: str = 'relu6',
            device: Any = None,
            dtype: torch.dtype | None = None,
            **kwargs: Any,
    ):
        check_layers(layers, widths=widths, expansion=expansion, kernel_size=kernel_size)
        if act not in ('relu6', 'silu'):
            raise LeanError(f"act must be 'relu6' or 'silu', got {act!r}.")
        act_layer = nn.SiLU if act == 'silu' else nn.ReLU6
        chs = stem_width = stem_width or 2 * widths[0]
        stages = []
        for i, (depth, width) in enumerate(zip(layers, widths, strict=True)):
            ratio = expansion if i > 0 else 1
            attention = partial(SqueezeExcite, rd_ratio=se_ratio / ratio) if se_ratio else None
            blocks: list[nn.Module] = []
            for j in range(depth):
                args: dict[str, Any] = dict(
                    in_chs=chs, out_chs=width, dw_kernel_size=kernel_size, stride=2 if i > 0 and j == 0 else 1,
                    act_layer=act_layer, se_layer=attention, device=device, dtype=dtype)
                blocks.append(InvertedResidual(exp_ratio=ratio, **args) if i > 0 else DepthwiseSeparableConv(**args))
                chs = width
            stages.append(nn.Sequential(*blocks))
        super().__init__(
            stages, widths, stem_width, act_layer=act_layer, head_width=head_width or 4 * widths[-1], device=device,
            dtype=dtype, **kwargs)


def _create(cls: type[StagedNet], variant: str, pretrained: bool, **kwargs: Any) -> StagedNet:
    layers = kwargs['layers']
    stages = len(layers) if isinstance(layers, (list, tuple)) else 0
    return build_model_with_cfg(
        cls, variant, pretrained, feature_cfg=dict(out_indices=tuple(range(stages + 1))), **kwargs)


default_cfgs = generate_default_cfgs({name + '.untrained': small_image_cfg('2106.14190') for name in (
    'lean_resnet', 'lean_resnext', 'lean_shared_resnet', 'lean_densenet', 'lean_efficientnet', 'lean_mobilenetv2',
)})


@register_model
def lean_resnet(pretrained: bool = False, **kwargs: Any) -> StagedNet:
    """ResNet of basic blocks; `layers` and `widths` are free (here those of ResNet-20)."""
    model_args = dict(layers=(3, 3, 3), widths=(16, 32, 64))
    return _create(LeanResNet, 'lean_resnet', pretrained, **dict(model_args, **kwargs))


@register_model
def lean_resnext(pretrained: bool = False, **kwargs: Any) -> StagedNet:
    """ResNeXt; `layers`, `widths` and `cardinality` are free."""
    model_args = dict(layers=(3, 3, 3), widths=(64, 128, 256), cardinality=8)
    return _create(LeanResNet, 'lean_resnext', pretrained, **dict(model_args, **kwargs))


@register_model
def lean_shared_resnet(pretrained: bool = False, **kwargs: Any) -> StagedNet:
    """ResNet with deeply shared filter bases (arXiv 2006.05066); `layers`, `widths` and the ranks are free."""
    model_args = dict(layers=(3, 3, 3), widths=(16, 32, 64), shared_rank=16, unique_rank=1)
    return _create(LeanResNet, 'lean_shared_resnet', pretrained, **dict(model_args, **kwargs))


@register_model
def lean_densenet(pretrained: bool = False, **kwargs: Any) -> StagedNet:
    """DenseNet-BC; `layers` and `growth` are free."""
    model_args = dict(layers=(3, 4, 8), growth=12)
    return _create(LeanDenseNet, 'lean_densenet', pretrained, **dict(model_args, **kwargs))


@register_model
def lean_efficientnet(pretrained: bool = False, **kwargs: Any) -> StagedNet:
    """EfficientNet-style inverted residuals with channel attention; `layers` and `widths` are free."""
    model_args = dict(layers=(2, 3, 3), widths=(16, 32, 64), se_ratio=0.25, act='silu')
    return _create(LeanMobileNet, 'lean_efficientnet', pretrained, **dict(model_args, **kwargs))


@register_model
def lean_mobilenetv2(pretrained: bool = False, **kwargs: Any) -> StagedNet:
    """MobileNetV2-style inverted residuals; `layers` and `widths` are free."""
    model_args = dict(layers=(2, 3, 3), widths=(16, 32, 64))
    return _create(LeanMobileNet, 'lean_mobilenetv2', pretrained, **dict(model_args, **kwargs))
