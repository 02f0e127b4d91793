"""Annotation files in COCO format, checked whole before a run that would stumble over them hours later.

MMDetection reads them without checks: what is missing or of another type ends in a traceback from a dataset, a box of
NaN in a loss that is NaN, and an unknown category in boxes that are silently left out.
"""
import json
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from timm_lean.errors import LeanError

__all__ = ['check_annotations', 'check_images_on_disk', 'read_annotations']

_SHOWN = 200  # characters of a value in a message
_BOX = 'a bbox [x, y, width, height] of finite numbers'


def read_annotations(path: Path) -> dict[str, Any]:
    """Parse an annotation file.

    Returns:
        An object whose `categories` are objects with an `id` and a `name`.

    Raises:
        LeanError: It is no JSON in UTF-8, or has no such categories.
    """
    try:
        data = json.loads(path.read_bytes().decode())
    except UnicodeDecodeError as e:
        raise LeanError(f'{path} is not UTF-8 text (byte {e.start}): it is damaged or no JSON. Save it so.') from e
    except (ValueError, RecursionError, OSError) as e:
        raise LeanError(f'{path} is damaged or no JSON: {str(e)[:200] or type(e).__name__}.') from e
    categories = data.get('categories') if isinstance(data, dict) else None
    if not isinstance(categories, list) or not categories or not all(
            isinstance(c, dict) and isinstance(c.get('name'), str) and _is_id(c.get('id')) for c in categories):
        raise LeanError(f'{path} has no list of categories with ids and names: it is damaged or not in COCO format.')
    _ids(categories, 'category', path)
    names = [category['name'] for category in categories]
    if twice := [name for name in names if names.count(name) > 1]:
        raise LeanError(f'{path} has the category name {_shown(twice[0])} twice; names must be unique.')
    return data


def check_annotations(data: dict[str, Any], path: Path, classes: Collection[str], needed: bool) -> None:
    """Check images and annotations of a file.

    Args:
        data: From `read_annotations`.
        path: The file, for messages.
        classes: Names of the categories that are used.
        needed: Whether there must be annotations of these classes.

    Raises:
        LeanError: The first image or annotation that cannot be used, or there are none.
    """
    images = _objects(data, 'images', path)
    if not images:
        raise LeanError(f'{path} has no images.')
    for image in images:
        for key in ('width', 'height'):
            if not _is_number(image.get(key)) or image[key] <= 0:
                raise _bad(path, 'image', image, f'a positive {key}', image.get(key))
        if not isinstance(image.get('file_name'), str) or not image['file_name']:
            raise _bad(path, 'image', image, 'a file_name', image.get('file_name'))
    image_ids = _ids(images, 'image', path)
    category_ids = {category['id']: category['name'] for category in data['categories']}
    annotations = _objects(data, 'annotations', path) if needed or 'annotations' in data else []
    _ids(annotations, 'annotation', path)
    used = False
    for annotation in annotations:
        for key, known in (('image_id', image_ids), ('category_id', category_ids)):
            if not _is_id(annotation.get(key)) or annotation[key] not in known:
                raise _bad(path, 'annotation', annotation, f'the {key} of one of the file', annotation.get(key))
        used |= category_ids[annotation['category_id']] in classes
        if annotation.get('ignore'):
            continue
        box = annotation.get('bbox')
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise _bad(path, 'annotation', annotation, _BOX, box)
        if not _is_number(annotation.get('area')):
            raise _bad(path, 'annotation', annotation, 'an area', annotation.get('area'))
    if needed and not used:
        raise LeanError(f'{path} has no annotations of the classes {_shown(sorted(classes))}.')


def check_images_on_disk(data: dict[str, Any], folder: Path, path: Path) -> None:
    """Check that the image files are there and not empty; every folder is listed once.

    Args:
        data: Checked by `check_annotations`.
        folder: Where the files are.
        path: The annotation file, for messages.

    Raises:
        LeanError: The message counts what is missing and names the first.
    """
    files = [os.path.join(folder, image['file_name']) for image in data['images']]
    folders = [name for name in {os.path.dirname(file) for file in files} if os.path.isdir(name)]
    present = {entry.path for name in folders for entry in os.scandir(name)}
    missing = [file for file in files if file not in present and not os.path.isfile(file)]
    if missing:
        raise LeanError(f'{len(missing):,} of the {len(files):,} images of {path} do not exist, {_shown(missing[0])} '
                        'the first. Give the folder of the data by --data-root, or set data_root and data_prefix in '
                        'the config.')
    if empty := [file for file in files if os.path.getsize(file) == 0]:
        raise LeanError(f'{len(empty):,} of the {len(files):,} images of {path} are empty files, {_shown(empty[0])} '
                        'the first.')


def _objects(data: dict[str, Any], key: str, path: Path) -> list[dict[str, Any]]:
    value = data.get(key)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise LeanError(f'{path} has no list of {key}: it is damaged or not in COCO format.')
    return value


def _ids(items: Sequence[dict[str, Any]], kind: str, path: Path) -> set[int | str]:
    ids = set()
    for item in items:
        if not _is_id(item.get('id')):
            raise _bad(path, kind, item, 'an id', item.get('id'))
        if item['id'] in ids:
            raise LeanError(f'{path} has the {kind} id {_shown(item["id"])} twice; ids must be unique.')
        ids.add(item['id'])
    return ids


def _bad(path: Path, kind: str, item: dict[str, Any], wanted: str, got: Any) -> LeanError:
    return LeanError(f'{path}: the {kind} with id {_shown(item.get("id"))} must have {wanted}, got {_shown(got)}.')


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + '...'
