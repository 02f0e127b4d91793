"""timm's `pretrained_cfg` from a file: how images are prepared and what the classes are called, checked.

What would fetch other weights or name another network is left out; so is what this version does not know.
"""
import math
from collections.abc import Callable
from typing import Any

from timm.data.transforms import str_to_interp_mode

from timm_lean.errors import CheckpointError

__all__ = ['clean_pretrained_cfg']

_MAX_SIZE = 4096  # pixels along a side
_MAX_CHANNELS = 1024


def clean_pretrained_cfg(cfg: dict[str, Any]) -> dict[str, Any]:
    """The known entries, lists as tuples where timm has tuples.

    Args:
        cfg: `pretrained_cfg` as parsed from JSON, or timm's own.

    Raises:
        CheckpointError: An entry has another type, length or range than timm and the data loaders can use.
    """
    result = {}
    for key, value in cfg.items():
        if key not in _ENTRIES:
            continue
        check, expected = _ENTRIES[key]
        if value is not None and not check(value):
            raise CheckpointError(f'pretrained_cfg: {key!r} is {str(value)[:100]!r}; expected {expected}.')
        result[key] = tuple(value) if isinstance(value, list) and key != 'label_names' else value
    mean, std = result.get('mean'), result.get('std')
    if mean is not None and std is not None and len(mean) != len(std):
        raise CheckpointError(f"pretrained_cfg: 'mean' has {len(mean)} numbers and 'std' {len(std)}; expected as many.")
    channels = (result.get('input_size') or (3,))[0]
    if mean is not None and len(mean) not in (1, 3, channels):
        raise CheckpointError(f"pretrained_cfg: 'mean' has {len(mean)} numbers for images of {channels} channels.")
    return result


def _is_int(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and low <= value <= high


def _is_list(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and all(map(check, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_size(value: Any) -> bool:
    return (_is_list(value, lambda n: _is_int(n, 1, _MAX_SIZE)) and len(value) == 3 and value[0] <= _MAX_CHANNELS)


def _is_pool_size(value: Any) -> bool:
    return _is_list(value, lambda n: _is_int(n, 1, _MAX_SIZE)) and len(value) == 2


def _is_interpolation(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        str_to_interp_mode(value)
    except KeyError:
        return value == 'random'
    return True


def _texts(value: Any) -> bool:
    return _is_text(value) or _is_list(value, _is_text)


_SIZE = (_is_size, f'channels, height and width, at most {_MAX_SIZE} pixels')
_CROP = (lambda v: _is_number(v, 0.01, 2), 'a share from 0.01 to 2')
_POOL = (_is_pool_size, 'two sizes')
_TEXT = (_is_text, 'text')
_TEXTS = (_texts, 'text or a list of texts')
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    'input_size': _SIZE,
    'test_input_size': _SIZE,
    'min_input_size': _SIZE,
    'fixed_input_size': (lambda v: isinstance(v, bool), 'true or false'),
    'interpolation': (_is_interpolation, 'the name of an interpolation, such as bicubic'),
    'crop_pct': _CROP,
    'test_crop_pct': _CROP,
    'crop_mode': (lambda v: v in ('center', 'squash', 'border'), 'center, squash or border'),
    'mean': (lambda v: _is_list(v, _is_number) and len(v) > 0, 'a list of numbers'),
    'std': (lambda v: _is_list(v, lambda n: _is_number(n, 1e-6)) and len(v) > 0, 'a list of numbers above 0'),
    'label_offset': (lambda v: _is_int(v, 0, 10 ** 6), 'a whole number'),
    'label_names': (lambda v: _is_list(v, _is_text), 'a list of texts'),
    'label_descriptions': (
        lambda v: _is_list(v, _is_text) or (isinstance(v, dict) and _is_list(list(v.values()), _is_text)),
        'texts by class name'),
    'pool_size': _POOL,
    'test_pool_size': _POOL,
    'first_conv': _TEXTS,
    'classifier': _TEXTS,
    'tag': _TEXT,
    'license': _TEXT,
    'description': _TEXT,
    'origin_url': _TEXT,
    'paper_name': _TEXT,
    'paper_ids': _TEXTS,
    'notes': _TEXTS,
}
