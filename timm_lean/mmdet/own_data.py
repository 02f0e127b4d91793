"""A user's own data in COCO format: the folder and the class names said once, and set wherever a config needs them.

A config names its folder in each dataset and in the evaluators, the classes in each dataset, and their number in each
head. Inheriting does not help, as a value that a config overrides does not reach the places where its base used it.
"""
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from timm_lean.errors import LeanError

from .data import HEADS, annotation_file, categories, datasets
from .settings import set_data_root

__all__ = ['set_classes', 'settle_data']


def settle_data(cfg: Config, data_root: str | Path | None = None, classes: Sequence[str] | None = None) -> None:
    """Set the folder and the classes of a config's data everywhere, in place.

    Args:
        cfg: The config. Its own `data_root` and `classes` count for all datasets of bases it inherits from.
        data_root: The folder, instead of the config's.
        classes: The names, instead of the config's; an empty list takes them from the training annotations.

    Raises:
        LeanError: There is nothing to set them in, or no annotations to take them from.
    """
    roots = {dataset.get('data_root') for split in ('train', 'val', 'test') for dataset in _of_split(cfg, split)}
    if data_root:
        set_data_root(cfg, data_root, () if cfg.get('data_root') else roots - {None})
    elif cfg.get('data_root') and roots and cfg.data_root not in roots:
        set_data_root(cfg, cfg.data_root, roots - {None})
    if classes is not None:
        set_classes(cfg, classes or _classes_of_annotations(cfg))
    elif cfg.get('classes'):
        set_classes(cfg, cfg.classes)


def set_classes(cfg: Config, classes: Sequence[str]) -> None:
    """Set the class names of all datasets, and their number in all heads, in place."""
    cfg.classes = tuple(classes)
    for split in ('train', 'val', 'test'):
        for dataset in _of_split(cfg, split):
            if tuple((dataset.get('metainfo') or {}).get('classes', ())) != cfg.classes:
                dataset['metainfo'] = dict(classes=cfg.classes)  # a palette would be of other classes
    for head in _heads(cfg.model):
        head['num_classes'] = len(cfg.classes)


def _of_split(cfg: Config, split: str) -> Iterator[Any]:
    return datasets((cfg.get(f'{split}_dataloader') or {}).get('dataset'))


def _classes_of_annotations(cfg: Config) -> list[str]:
    for dataset in _of_split(cfg, 'train'):
        path = annotation_file(dataset)
        if path is None or not path.is_file():
            raise LeanError(f'--classes reads the names in the annotation file {path}, which does not exist. Give the '
                            'folder of the data by --data-root, or the names: --classes cat dog.')
        return categories(path)
    raise LeanError('--classes: the config has no training dataset to read the names from. Give them: '
                    '--classes cat dog.')


def _heads(part: Any, name: str = '') -> Iterator[Any]:
    """The heads that have a number of classes, in whatever they are nested."""
    if isinstance(part, (list, tuple)):
        for item in part:
            yield from _heads(item, name)
    elif isinstance(part, dict):
        if name in HEADS and 'num_classes' in part:
            yield part
        for key, value in part.items():
            yield from _heads(value, key)
