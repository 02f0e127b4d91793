"""Checks of a config's COCO-format data before a run: files, categories, annotations, number of classes."""
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from timm_lean.errors import LeanError

from .annotations import check_annotations, check_images_on_disk, read_annotations

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
        LeanError: An annotation file is missing or damaged, its categories are not the config's classes, images are
            missing, or the detector has another number of classes.
    """
    register_all_modules(init_default_scope=False)
    checked: set[Path] = set()
    for split in splits:
        for dataset in datasets((cfg.get(f'{split}_dataloader') or {}).get('dataset')):
            classes, said_by = _classes(dataset)
            if classes is None:
                continue
            _check_heads(cfg.model, classes, said_by.format(split))
            if not dataset['type'].endswith(_GENERATED):
                _check_file(dataset, classes, split, checked)


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


def _check_file(dataset: Any, classes: Sequence[str], split: str, checked: set[Path]) -> None:
    path = annotation_file(dataset)
    if path is None or path in checked:
        return
    checked.add(path)
    if not path.is_file():
        raise LeanError(f'The annotation file {path} of the {split} dataset does not exist. Give the folder of the '
                        'data by --data-root, or set data_root and ann_file in the config.')
    data = read_annotations(path)
    names = [category['name'] for category in data['categories']]
    missing = [name for name in classes if name not in names]
    if missing:
        raise LeanError(
            f'{path} has the categories {_listed(names)}, but the config expects {_listed(missing)}. Set '
            "the config's classes=(...) to the names in the file, or give --classes, which reads them there.")
    if not _reads_plain_coco(dataset):
        return
    check_annotations(data, path, classes, needed=split != 'test')
    prefix = (dataset.get('data_prefix') or {}).get('img')
    if prefix is not None and '://' not in prefix and not dataset.get('backend_args'):
        check_images_on_disk(data, Path(dataset.get('data_root') or '', prefix), path)


def annotation_file(dataset: Any) -> Path | None:
    """The annotation file of a COCO-format dataset, None if it is not a local one."""
    if '://' in str(dataset.get('data_root')) or not dataset.get('ann_file'):
        return None
    return Path(dataset.get('data_root') or '', dataset['ann_file'])


def categories(path: Path) -> list[str]:
    """Category names of a COCO file."""
    return [category['name'] for category in read_annotations(path)['categories']]


def _reads_plain_coco(dataset: Any) -> bool:
    """Whether its class takes images and annotations from the file as CocoDataset does; LVIS and others do not."""
    from mmdet.datasets import CocoDataset
    kind = DATASETS.get(dataset['type'])
    return (kind.load_data_list is CocoDataset.load_data_list and kind.parse_data_info is CocoDataset.parse_data_info)


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
