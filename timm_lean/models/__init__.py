"""The paper's networks as timm models; importing this package registers them with timm."""
from . import cifar_families, lean, lean_families, mobilenetv2, resnet, resnet_cifar
from .cifar_families import CifarDenseNet, CifarMobileNetV2, CifarResNeXt
from .lean_families import LeanDenseNet, LeanMobileNet, LeanResNet
from .mobilenetv2 import SharedMobileNetV2
from .resnet import SharedResNet
from .resnet_cifar import CifarResNet

__all__ = [
    'CifarDenseNet', 'CifarMobileNetV2', 'CifarResNeXt', 'CifarResNet', 'LeanDenseNet', 'LeanMobileNet', 'LeanResNet',
    'SharedMobileNetV2', 'SharedResNet', 'lean', 'model_names',
]


def model_names() -> list[str]:
    """All model names this package adds to timm, sorted."""
    modules = (cifar_families, lean_families, mobilenetv2, resnet, resnet_cifar)
    return sorted(name for module in modules for name in module.default_cfgs)
