"""The scope `timm_lean` in MMEngine's registries.

A class is registered twice: in this scope (`type='timm_lean.TimmBackbone'`) and in MMEngine's root registry, where
plain `type='TimmBackbone'` finds it whatever the default scope is.
"""
import functools
from collections.abc import Callable
from typing import Any

from mmengine.registry import DATASETS as ROOT_DATASETS
from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry

from .arguments import check_arguments

__all__ = ['DATASETS', 'HOOKS', 'MODELS', 'register']

SCOPE = 'timm_lean'

DATASETS = Registry('dataset', parent=ROOT_DATASETS, scope=SCOPE)
HOOKS = Registry('hook', parent=ROOT_HOOKS, scope=SCOPE)
MODELS = Registry('model', parent=ROOT_MODELS, scope=SCOPE)


def register(registry: Registry) -> Callable[[type], type]:
    """Class decorator: register a class in one of this file's registries and in the root registry above it.

    A config's argument that the class does not have is a `LeanError`.
    """
    def decorate(cls: Any) -> type:
        initialize = cls.__init__

        @functools.wraps(initialize)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            check_arguments(initialize, kwargs, cls.__name__)
            initialize(self, *args, **kwargs)

        cls.__init__ = checked
        registry.register_module(module=cls)
        registry.parent.register_module(module=cls)
        return cls
    return decorate
