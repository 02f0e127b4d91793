"""Training on from a compressed file: a config takes over what has been done to the structure since.

The user's config describes the detector as it was; the file in `load_from` says what was done to it. So the same config
trains both, and only `load_from` differs.
"""
from pathlib import Path
from typing import Any

from mmengine.config import Config

from timm_lean.checkpoint.limits import check_steps
from timm_lean.checkpoint.recipe import Recipe
from timm_lean.errors import CheckpointError

from .settings import parse_config
from .structure import set_steps, steps_of
from .weights import detector_header, load_checkpoint

__all__ = ['STEPS_META', 'adopt_structure']

STEPS_META = 'timm_lean_steps'
"""Entry in the `meta` of a `.pth` of a training whose detector was changed by a hook: its steps."""


def adopt_structure(cfg: Config, checkpoint: str | Path) -> None:
    """Let a config build the structure of a detector's file, in place; nothing to do for other files.

    Args:
        cfg: The detector's config. Steps that it has itself are left as they are.
        checkpoint: What its weights come from.
    """
    header: dict[str, Any] = {'backbone': None}
    try:
        if str(checkpoint).endswith('.safetensors'):
            header = detector_header(checkpoint)
            steps = steps_of(parse_config(header['config'], str(checkpoint)))
        else:
            steps = load_checkpoint(checkpoint).get('meta', {}).get(STEPS_META) or []
    except CheckpointError:  # no file of a detector: whoever loads it says what is wrong
        return
    if steps and not steps_of(cfg):
        check_steps(steps)
        set_steps(cfg, steps)
    backbone: Any = cfg.model.get('backbone')
    if (header['backbone'] and header['backbone']['steps'] and isinstance(backbone, dict)
            and str(backbone.get('type')).rpartition('.')[2] == 'TimmBackbone' and not backbone.get('checkpoint')
            and not backbone.get('share')):
        given = Recipe.from_create_args(backbone.get('model_name', ''), dict(backbone.get('model_args') or {}))
        stored = Recipe(**header['backbone'])
        if not given.steps and given.architecture.split('.')[0] == stored.architecture.split('.')[0]:
            check_steps(stored.steps)
            backbone['model_name'], backbone['model_args'] = stored.create_args()
