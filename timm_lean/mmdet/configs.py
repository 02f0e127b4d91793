"""This package's configs by name: `timm_lean::retinanet/retinanet_resnet50_shared_1x_coco.py`, for
`mmengine.hub.get_config` and as a `_base_`.

In a wheel they lie in `timm_lean/.mim/configs`, where MMEngine keeps the configs of packages; in a checkout in
`mmdet_configs/`. MMEngine's own look-up by package name does not serve: it takes only packages of its list, does not
find those that are installed editable, and would build the types in an inherited config in the scope `timm_lean`,
where MMDetection's are unknown.
"""
import functools
from pathlib import Path

import mmengine.hub
from mmengine.config import Config
from mmengine.hub import hub

from timm_lean.errors import LeanError

__all__ = ['config_file', 'install']

PREFIX = 'timm_lean::'
_PACKAGE = Path(__file__).parents[1]


def config_file(name: str) -> Path:
    """The file of one of this package's configs.

    Args:
        name: With or without `timm_lean::`, such as `timm_lean::bccd/retinanet_resnet34_bccd.py`.

    Raises:
        LeanError: There is no such config; the message lists those there are.
    """
    folder = next(f for f in (_PACKAGE / '.mim' / 'configs', _PACKAGE.parent / 'mmdet_configs') if f.is_dir())
    path = folder / name.removeprefix(PREFIX)
    if not path.is_file():
        known = sorted(str(p.relative_to(folder)) for p in folder.glob('[!_]*/*.py'))
        raise LeanError(f'There is no config {name}. Those of this package: {", ".join(known)}.')
    return path


def install() -> None:
    """Let MMEngine open this package's configs, as a `_base_` and by `mmengine.hub.get_config`. Idempotent."""
    if getattr(Config._get_cfg_path, 'knows_timm_lean', False):
        return
    base_path, packages_config = Config._get_cfg_path, hub.get_config

    @functools.wraps(base_path)
    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        if cfg_path.startswith(PREFIX):
            return str(config_file(cfg_path)), None
        return base_path(cfg_path, filename)

    @functools.wraps(packages_config)
    def get_config(cfg_path: str, pretrained: bool = False) -> Config:
        if not cfg_path.startswith(PREFIX):
            return packages_config(cfg_path, pretrained)
        if pretrained:
            raise LeanError(f'There are no trained weights for {cfg_path}. Leave out pretrained=True.')
        return Config.fromfile(config_file(cfg_path))

    get_cfg_path.knows_timm_lean = True  # type: ignore[attr-defined]
    Config._get_cfg_path = staticmethod(get_cfg_path)
    mmengine.hub.get_config = hub.get_config = get_config
