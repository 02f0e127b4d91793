"""The paper's networks as timm models; importing this package registers them with timm."""
from . import lean, lean_families, mobilenetv2, resnet, resnet_cifar
from .lean_families import LeanDenseNet, LeanMobileNet, LeanResNet
from .mobilenetv2 import SharedMobileNetV2
from .resnet import SharedResNet
from .resnet_cifar import CifarResNet

__all__ = [
    'CifarResNet', 'LeanDenseNet', 'LeanMobileNet', 'LeanResNet', 'SharedMobileNetV2', 'SharedResNet', 'lean',
    'model_names',
]


def model_names() -> list[str]:
    """All model names this package adds to timm, sorted."""
    return sorted(name for module in (lean_families, mobilenetv2, resnet, resnet_cifar) for name in module.default_cfgs)
