"""ResNets for ImageNet with deeply shared filter bases, on timm's ResNet.

Paper: `Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks`
- https://arxiv.org/abs/2006.05066, table 1.
"""
from collections.abc import Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from timm_lean.sharing.fold import fold

from ._sharing import share_convs, share_filter_basis

__all__ = ['SharedResNet']


class SharedResNet(ResNet):
    """timm's ResNet with parameters shared between the blocks of a stage.

    Args:
        block: The class `BasicBlock` or `Bottleneck`.
        layers: Blocks in each stage.
        shared_rank: Shared filters in the first stage, doubled in each further one (s of "SsUu").
        unique_rank: Unique filters of each convolution in the first stage, doubled likewise (u of "SsUu").
        dual: One basis for the first and one for the second convolution of the blocks.
        shared_convs: Instead of bases, the convolutions of a block that are shared whole ("Shared", "Shared++").
        zero_init_last: As in timm, but off: the paper's networks do not use it.
        **kwargs: timm's ResNet arguments.
    """

    fold = fold

    def __init__(
            self,
            block: Any,
            layers: tuple[int, ...],
            shared_rank: int = 0,
            unique_rank: int = 0,
            dual: bool = False,
            shared_convs: Sequence[str] = (),
            zero_init_last: bool = False,
            **kwargs: Any,
    ):
        super().__init__(block, layers, zero_init_last=zero_init_last, **kwargs)
        stages = [self.layer1, self.layer2, self.layer3, self.layer4]
        if shared_convs:
            share_convs(stages, shared_convs)
        else:
            share_filter_basis(stages, shared_rank, unique_rank, dual=dual)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> SharedResNet:
    return build_model_with_cfg(SharedResNet, variant, pretrained, **kwargs)


def _resnet34(variant: str, pretrained: bool, shared_rank: int, dual: bool, /, **kwargs: Any) -> SharedResNet:
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3), shared_rank=shared_rank, unique_rank=1, dual=dual)
    return _create(variant, pretrained, **dict(model_args, **kwargs))


def _bottleneck(
        variant: str, pretrained: bool, layers: tuple[int, ...], shared_convs: tuple[str, ...], /, **kwargs: Any,
) -> SharedResNet:
    model_args = dict(block=Bottleneck, layers=layers, shared_convs=shared_convs)
    return _create(variant, pretrained, **dict(model_args, **kwargs))


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        'url': '', 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0', 'paper_ids': 'arXiv:2006.05066',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({name + '.untrained': _cfg() for name in (
    'resnet34_s32u1', 'resnet34_s48u1', 'resnet34_s32u1_dual', 'resnet34_s48u1_dual',
    'resnet50_shared', 'resnet50_sharedpp', 'resnet101_shared', 'resnet101_sharedpp',
)})


@register_model
def resnet34_s32u1(pretrained: bool = False, **kwargs: Any) -> SharedResNet:
    """ResNet-34, one basis of 32 shared filters per stage (doubling) and 1 unique filter per convolution."""
    return _resnet34('resnet34_s32u1', pretrained, 32, False, **kwargs)


@register_model
def resnet34_s48u1(pretrained: bool = False, **kwargs: Any) -> SharedResNet:
    """ResNet-34, one basis of 48 shared filters per stage (doubling) and 1 unique filter per convolution."""
    return _resnet34('resnet34_s48u1', pretrained, 48, False, **kwargs)


@register_model
def resnet34_s32u1_dual(pretrained: bool = False, **kwargs: Any) -> SharedResNet:
    """`resnet34_s32u1` with one basis for the blocks' first convolutions and another for the second ones."""
    return _resnet34('resnet34_s32u1_dual', pretrained, 32, True, **kwargs)


@register_model
def resnet34_s48u1_dual(pretrained: bool = False, **kwargs: Any) -> SharedResNet:
    """`resnet34_s48u1` with one basis for the blocks' first convolutions and another for the second ones."""
    return _resnet34('resnet34_s48u1_dual', pretrained, 48, True, **kwargs)


@register_model
def resnet50_shared(pretrained: bool = False, **kwargs: Any) -> SharedResNet:
    """ResNet-50 whose stages share one 3 x 3 convolution from the second block on ("Shared")."""
    return _bottleneck('resnet50_shared', pretrained, (3, 4, 6, 3), ('conv2',), **kwargs)


@register_model
def resnet50_sharedpp(pretrained: bool = False, **kwargs: Any) -> SharedResNet:
    """`resnet50_shared` that also shares the last 1 x 1 convolution of the blocks ("Shared++")."""
    return _bottleneck('resnet50_sharedpp', pretrained, (3, 4, 6, 3), ('conv2', 'conv3'), **kwargs)


@register_model
def resnet101_shared(pretrained: bool = False, **kwargs: Any) -> SharedResNet:
    """ResNet-101 whose stages share one 3 x 3 convolution from the second block on ("Shared")."""
    return _bottleneck('resnet101_shared', pretrained, (3, 4, 23, 3), ('conv2',), **kwargs)


@register_model
def resnet101_sharedpp(pretrained: bool = False, **kwargs: Any) -> SharedResNet:
    """`resnet101_shared` that also shares the last 1 x 1 convolution of the blocks ("Shared++")."""
    return _bottleneck('resnet101_sharedpp', pretrained, (3, 4, 23, 3), ('conv2', 'conv3'), **kwargs)
