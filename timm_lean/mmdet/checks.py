"""Mistakes in the settings of a run that MMEngine meets late, or with a traceback: one line each, before it starts."""
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mmengine.config import Config

from timm_lean.errors import LeanError

__all__ = ['check_settings', 'registry_errors']


def check_settings(cfg: Config, splits: Sequence[str]) -> None:
    """Check batch sizes, numbers of workers and the learning rate of a config.

    Args:
        cfg: The config.
        splits: Which of `train`, `val` and `test` will be used.

    Raises:
        LeanError: One of them is out of range.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader') or {}
        for key, least in (('batch_size', 1), ('num_workers', 0)):
            value = loader.get(key, least)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise LeanError(f'{split}_dataloader.{key} must be a whole number of at least {least}, got {value!r}.')
    if 'train' in splits:
        optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
        for key in ('lr', 'weight_decay'):
            value = optimizer.get(key, 0)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise LeanError(f'optim_wrapper.optimizer.{key} must be a finite number of at least 0, got {value!r}.')


@contextmanager
def registry_errors() -> Iterator[None]:
    """Turn MMEngine's complaint about a type that is registered nowhere into a LeanError.

    Raises:
        LeanError: For the KeyError of `build_from_cfg`; all others pass.
    """
    try:
        yield
    except KeyError as e:
        message: Any = e.args[0] if e.args else ''
        if not isinstance(message, str) or ' is not in the ' not in message:
            raise
        name, _, rest = message.partition(' is not in the ')
        raise LeanError(f'The config asks for the type {name!r}, which is not in the {rest.split(" registry")[0]} '
                        'registry. Correct the name, or let custom_imports import its module.') from e
