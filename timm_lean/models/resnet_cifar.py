"""ResNets for 32 x 32 images, dense and with deeply shared filter bases.

Papers:
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385, section 4.2 (widths 16/32/64)
* `Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks`
  - https://arxiv.org/abs/2006.05066, tables 2 and 4

Two kinds: the thin networks for CIFAR-10 (three stages, parameter-free shortcuts) and ImageNet's ResNet-18/34 with a
3 x 3 stem and no pooling for CIFAR-100 (four stages, 1 x 1 convolution shortcuts).
"""
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ._staged import check_layers, small_image_cfg
from .lean_families import LeanResNet

__all__ = ['CifarResNet']

_PAPER = '2006.05066'


class CifarResNet(LeanResNet):
    """Residual network of basic blocks for small images; the stem does not reduce the resolution.

    Args:
        layers: Blocks in each stage.
        channels: Width of each stage; the stem has the first one's.
        conv_shortcut: Shortcuts by 1 x 1 convolution and BN instead of zero padding.
        **kwargs: Arguments of `LeanResNet`, of which `shared_rank`, `unique_rank` and `dual` build the shared bases.
    """

    def __init__(
            self,
            layers: tuple[int, ...],
            channels: tuple[int, ...] = (16, 32, 64),
            conv_shortcut: bool = False,
            **kwargs: Any,
    ):
        check_layers(layers, channels=channels)
        super().__init__(layers, channels, stem_width=channels[0], conv_shortcut=conv_shortcut, **kwargs)


def _create(variant: str, pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    channels = kwargs['channels']
    return build_model_with_cfg(
        CifarResNet, variant, pretrained, feature_cfg=dict(out_indices=tuple(range(len(channels) + 1))), **kwargs)


def _thin(variant: str, pretrained: bool, depth: int, /, **kwargs: Any) -> CifarResNet:
    """Widths 16/32/64, depth 6n + 2, parameter-free shortcuts."""
    model_args = dict(layers=((depth - 2) // 6,) * 3, channels=(16, 32, 64))
    return _create(variant, pretrained, **dict(model_args, **kwargs))


def _wide(variant: str, pretrained: bool, layers: tuple[int, ...], /, **kwargs: Any) -> CifarResNet:
    """Widths 64..512, 1 x 1 convolution shortcuts."""
    model_args = dict(layers=layers, channels=(64, 128, 256, 512), conv_shortcut=True)
    return _create(variant, pretrained, **dict(model_args, **kwargs))


default_cfgs = generate_default_cfgs({
    **{name + '.untrained': small_image_cfg(_PAPER) for name in (
        'resnet20_cifar', 'resnet32_cifar', 'resnet56_cifar', 'resnet110_cifar',
        'resnet32_cifar_s8u1', 'resnet32_cifar_s16u1', 'resnet32_cifar_s16u1_dual',
        'resnet56_cifar_s8u1', 'resnet56_cifar_s16u1', 'resnet56_cifar_s16u1_dual',
    )},
    **{name + '.untrained': small_image_cfg(_PAPER, num_classes=100, pool_size=4) for name in (
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
