"""The resume state: everything a run needs to continue after its last completed epoch.

One file, written whole or not at all, of tensors and plain data only (`torch.load(weights_only=True)`). Random
generators are not in it: each epoch seeds them from the run's seed and its number.
"""
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from timm_lean.checkpoint.files import atomic_file
from timm_lean.errors import CheckpointError, LeanError

__all__ = ['RESUME_FILE', 'load_state', 'restoring', 'save_state']

RESUME_FILE = 'resume.pt'
_ADVICE = 'Start a new run in another --output.'
_NONE = type(None)
_ENTRIES: dict[str, tuple[type, ...]] = {
    'recipe': (dict,), 'epoch': (int,), 'best': (dict,), 'rows': (list,), 'updates': (int,), 'optimizer': (dict,),
    'scaler': (dict, _NONE), 'pruner': (dict, _NONE), 'state_dict': (dict,), 'state_dict_ema': (dict, _NONE),
    'task_state': (dict, _NONE), 'task_state_ema': (dict, _NONE)}


def save_state(directory: Path, state: dict[str, Any]) -> None:
    """Write the resume state of a run."""
    # through a Python file, whose errors say what the disk refused; torch's own writer does not
    with atomic_file(directory / RESUME_FILE) as temporary, open(temporary, 'wb') as file:
        torch.save(state, file)


def load_state(directory: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """Read the resume state of a run, or None if the run was stopped before its first save.

    Args:
        directory: The run's folder.
        recipe: What the model to continue with is; it must be what was saved.

    Raises:
        CheckpointError: The file is damaged or from a run of another model.
    """
    path = directory / RESUME_FILE
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as e:
        raise CheckpointError(f'{path} is damaged: {" ".join(str(e).split())[:500]}. {_ADVICE}') from e
    if wrong := _wrong_entry(state):
        raise CheckpointError(f'{path} is damaged: {wrong}. {_ADVICE}')
    saved = state['recipe']
    if saved != recipe:
        raise CheckpointError(
            f'{path} (epoch {state["epoch"]}) is from another model: {saved.get("architecture")!r} with '
            f'{saved.get("model_args")}, not {recipe["architecture"]!r} with {recipe["model_args"]}. Give the same '
            '--model and classes, or start a new run in another --output.')
    return state


@contextmanager
def restoring(directory: Path) -> Iterator[None]:
    """Make one CheckpointError of what optimizers and networks raise when the state inside the file is not theirs."""
    try:
        yield
    except LeanError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as e:
        raise CheckpointError(f'{directory / RESUME_FILE} is damaged: {type(e).__name__}: '
                              f'{" ".join(str(e).split())[:500]}. {_ADVICE}') from e


def _wrong_entry(state: Any) -> str | None:
    """What is not of the type that `save_state` was given."""
    if not isinstance(state, dict):
        return f'it holds a {type(state).__name__}; expected entries by name'
    for key, kinds in _ENTRIES.items():
        value = state.get(key)
        if not isinstance(value, kinds):
            names = ' or '.join(kind.__name__ for kind in kinds if kind is not type(None))
            return f'{key!r} is a {type(value).__name__}; expected a {names}'
    for key in ('state_dict', 'state_dict_ema'):
        if not all(isinstance(tensor, torch.Tensor) for tensor in (state.get(key) or {}).values()):
            return f'{key!r} should hold tensors'
    if not all(isinstance(row, dict) for row in state['rows']):
        return "'rows' should hold the epochs' rows"
    if any(type(state[key]) is not int or state[key] < 0 for key in ('epoch', 'updates')):
        return f'it is of epoch {state["epoch"]} after {state["updates"]} updates; expected numbers from 0'
    if not all(isinstance(state['best'].get(key), float) for key in ('top1', 'epoch')):
        return "'best' should hold the top-1 and the epoch"
    return None
