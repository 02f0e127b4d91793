"""Checks of a config's COCO-format data before a run: files, category names, number of classes."""
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from timm_lean.errors import LeanError

__all__ = ['HEADS', 'annotation_file', 'categories', 'check_data', 'datasets']

HEADS = ('bbox_head', 'mask_head', 'query_head', 'segm_head')
"""Parts of a detector that have an output per class."""

_GENERATED = 'DigitScenes'  # writes its files itself
_SHOWN = 12  # names in a message


def check_data(cfg: Config, splits: Sequence[str]) -> None:
    """Check the datasets of a config.

    Args:
        cfg: The config.
        splits: Which of `train`, `val` and `test` will be used.

    Raises:
        LeanError: An annotation file is missing, its categories are not the config's classes, or the detector has
            another number of classes.
    """
    register_all_modules(init_default_scope=False)
    for split in splits:
        for dataset in datasets((cfg.get(f'{split}_dataloader') or {}).get('dataset')):
            classes, said_by = _classes(dataset)
            if classes is None:
                continue
            _check_heads(cfg.model, classes, said_by.format(split))
            if not dataset['type'].endswith(_GENERATED):
                _check_file(dataset, classes, split)


def datasets(dataset: Any) -> Iterator[Any]:
    """The datasets inside wrappers that repeat, balance, mix or join them."""
    if isinstance(dataset, (list, tuple)):
        for item in dataset:
            yield from datasets(item)
    elif isinstance(dataset, dict):
        inner = dataset.get('dataset', dataset.get('datasets'))
        if inner is not None:
            yield from datasets(inner)
        elif isinstance(dataset.get('type'), str):
            yield dataset


def _classes(dataset: Any) -> tuple[tuple[str, ...] | None, str]:
    """The classes of a COCO-format dataset, and what says them; None for other kinds."""
    from mmdet.datasets import CocoDataset
    kind = DATASETS.get(dataset['type'])
    if kind is None or not issubclass(kind, CocoDataset):
        return None, ''
    metainfo = dataset.get('metainfo') or {}
    if not isinstance(metainfo, dict):
        return None, ''
    said_by = 'the metainfo of the {} dataset' if 'classes' in metainfo else kind.__name__
    classes = metainfo.get('classes', kind.METAINFO.get('classes'))
    return tuple(classes) if isinstance(classes, (list, tuple)) else None, said_by


def _check_file(dataset: Any, classes: Sequence[str], split: str) -> None:
    path = annotation_file(dataset)
    if path is None:
        return
    if not path.is_file():
        raise LeanError(f'The annotation file {path} of the {split} dataset does not exist. Give the folder of the '
                        'data by --data-root, or set data_root and ann_file in the config.')
    names = categories(path)
    missing = [name for name in classes if name not in names]
    if missing:
        raise LeanError(
            f'{path} has the categories {_listed(names)}, but the config expects {_listed(missing)}. Set '
            "the config's classes=(...) to the names in the file, or give --classes, which reads them there.")


def annotation_file(dataset: Any) -> Path | None:
    """The annotation file of a COCO-format dataset, None if it is not a local one."""
    if '://' in str(dataset.get('data_root')) or not dataset.get('ann_file'):
        return None
    return Path(dataset.get('data_root') or '', dataset['ann_file'])


def categories(path: Path) -> list[str]:
    """Category names of a COCO file; only that part is parsed, as the file may be huge."""
    text = path.read_text(encoding='utf-8')
    decoder = json.JSONDecoder()
    for match in re.finditer(r'"categories"\s*:\s*', text):
        try:
            value, _ = decoder.raw_decode(text, match.end())
            return [str(category['name']) for category in value]
        except (ValueError, TypeError, KeyError):
            continue
    raise LeanError(f'{path} has no list of categories with names: it is damaged or not in COCO format.')


def _check_heads(model: Any, classes: Sequence[str], said_by: str, head: str = '') -> None:
    for key, value in model.items() if isinstance(model, dict) else ():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            _check_heads(item, classes, said_by, key)
    if head in HEADS and model.get('num_classes', len(classes)) != len(classes):
        raise LeanError(f'The {head} has num_classes={model["num_classes"]}, but {said_by} has {len(classes)} classes '
                        f'({_listed(classes)}). Say the names once, as classes=(...) in the config or by --classes: '
                        'datasets and heads then follow.')


def _listed(names: Sequence[str]) -> str:
    return ', '.join(names[:_SHOWN]) + (f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else '')
