"""The timm name `lean`: a network described by another timm name and the structural steps taken on it.

It lets `timm.create_model('local-dir:DIR', pretrained=True)` rebuild folded, pruned and converted networks.
"""
from typing import Any

import timm
import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet

from timm_lean.checkpoint.recipe import LEAN_ENTRY, Step, apply_steps
from timm_lean.errors import LeanError

default_cfgs = generate_default_cfgs({
    'lean.untrained': {'url': '', 'num_classes': -1, 'input_size': (3, 224, 224), 'license': 'apache-2.0'},
})


def _build(base: str = '', recipe: list[Step] | None = None, **kwargs: Any) -> nn.Module:
    if not base or base == LEAN_ENTRY:
        raise LeanError("The model 'lean' needs base=NAME, the timm name of the network it restructures.")
    model = timm.create_model(base, **kwargs)
    return apply_steps(model, recipe or [])


def _features(model: nn.Module, out_indices: Any = None, **kwargs: Any) -> nn.Module:
    # feature_info lists what the restructured network really has, so nothing may be assumed about its length
    info = model.feature_info
    count = len(info) if isinstance(info, (list, tuple)) else len(info.channels())  # type: ignore[union-attr, operator]
    return FeatureGetterNet(model, out_indices=tuple(range(count)) if out_indices is None else out_indices, **kwargs)


@register_model
def lean(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A restructured network: `base=` is a timm name, `recipe=` the list of structural steps."""
    return build_model_with_cfg(
        _build, 'lean', pretrained, feature_cfg=dict(out_indices=None, feature_cls=_features), **kwargs)
