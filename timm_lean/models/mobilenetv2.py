"""MobileNetV2 with shared 1 x 1 convolutions, on timm's EfficientNet builder.

Paper: `Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks`
- https://arxiv.org/abs/2006.05066, tables 1 and 3.

The paper's MobileNetV2 differs from timm's: the stem and the last 1 x 1 convolution have biases, and the first block
(expansion 1) keeps its 1 x 1 expansion with BN. In the authors' code the blocks, but not stem and head, have ReLU:
`block_act_layer='relu'`.
"""
from typing import Any

import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import EcaModule, get_act_layer
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet

from timm_lean.sharing.fold import fold

from ._sharing import share_convs

__all__ = ['SharedMobileNetV2']

_ARCH_DEF = [
    ['ir_r1_k3_s1_e1_c16'],
    ['ir_r2_k3_s2_e6_c24'],
    ['ir_r3_k3_s2_e6_c32'],
    ['ir_r4_k3_s2_e6_c64'],
    ['ir_r3_k3_s1_e6_c96'],
    ['ir_r3_k3_s2_e6_c160'],
    ['ir_r1_k3_s1_e6_c320'],
]
# Stages of width 32, 64, 96 and 160, the ones whose blocks 2.. share.
_SHARED_STAGES = (2, 3, 4, 5)


class SharedMobileNetV2(EfficientNet):
    """MobileNetV2 whose blocks of one stage share their 1 x 1 convolutions.

    Args:
        shared_convs: Names of the shared convolutions of a block: `conv_pw` (expansion), `conv_pwl` (projection).
        eca: Put efficient channel attention behind the shared blocks' projection.
        block_act_layer: Activation within the blocks, by timm's name; `act_layer`, timm's argument for the whole
            network, if None.
        **kwargs: timm's EfficientNet arguments.
    """

    fold = fold

    def __init__(
            self,
            shared_convs: tuple[str, ...] = ('conv_pw',),
            eca: bool = False,
            block_act_layer: str | None = None,
            **kwargs: Any,
    ):
        model_args: dict[str, Any] = dict(
            block_args=decode_arch_def(_ARCH_DEF), num_features=1280, act_layer=nn.ReLU6)
        model_args.update(kwargs)
        if block_act_layer is not None:
            model_args['block_args'] = [[dict(block, act_layer=get_act_layer(block_act_layer)) for block in stage]
                                        for stage in model_args['block_args']]
        super().__init__(**model_args)
        self.conv_stem = _with_bias(self.conv_stem)
        self.conv_head = _with_bias(self.conv_head)
        stages: list[Any] = [self.blocks[i] for i in _SHARED_STAGES]
        share_convs(stages, shared_convs)
        if eca:
            for stage in stages:
                for block in list(stage)[1:]:
                    weight = block.bn3.weight
                    attn = EcaModule(
                        kernel_size=1 if weight.shape[0] < 96 else 3, device=weight.device, dtype=weight.dtype)
                    block.bn3 = nn.Sequential(block.bn3, attn)


def _with_bias(conv: nn.Conv2d) -> nn.Conv2d:
    """The same convolution with a zero bias (created by timm without)."""
    new = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,  # type: ignore[arg-type]
        device=conv.weight.device, dtype=conv.weight.dtype)
    new.weight = conv.weight
    assert new.bias is not None
    nn.init.zeros_(new.bias)
    return new


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> SharedMobileNetV2:
    return build_model_with_cfg(
        SharedMobileNetV2, variant, pretrained, feature_cfg=dict(flatten_sequential=True), **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'url': '', 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv_stem', 'classifier': 'classifier', 'license': 'apache-2.0',
        'paper_ids': 'arXiv:2006.05066',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'mobilenetv2_100_shared.untrained': _cfg(),
    'mobilenetv2_100_sharedpp.untrained': _cfg(),
})


@register_model
def mobilenetv2_100_shared(pretrained: bool = False, **kwargs: Any) -> SharedMobileNetV2:
    """MobileNetV2 1.0 that shares the 1 x 1 expansions in the stages of width 32, 64, 96 and 160 ("Shared")."""
    return _create('mobilenetv2_100_shared', pretrained, **dict(dict(shared_convs=('conv_pw',)), **kwargs))


@register_model
def mobilenetv2_100_sharedpp(pretrained: bool = False, **kwargs: Any) -> SharedMobileNetV2:
    """`mobilenetv2_100_shared` that also shares the projections, each followed by channel attention ("Shared++")."""
    model_args = dict(shared_convs=('conv_pw', 'conv_pwl'), eca=True)
    return _create('mobilenetv2_100_sharedpp', pretrained, **dict(model_args, **kwargs))
