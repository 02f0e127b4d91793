"""Where a timm model's classifier is."""
import torch.nn as nn

__all__ = ['classifier_modules']


def classifier_modules(model: nn.Module) -> list[nn.Module]:
    """The classifier of a timm model, whose outputs are classes and no channels."""
    get = getattr(model, 'get_classifier', None)
    head = get() if callable(get) else None
    heads = head if isinstance(head, (tuple, list)) else [head]
    return [m for h in heads if isinstance(h, nn.Module) for m in h.modules()]
