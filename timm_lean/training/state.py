"""The resume state: everything a run needs to continue after its last completed epoch.

One file, written whole or not at all, of tensors and plain data only (`torch.load(weights_only=True)`). Random
generators are not in it: each epoch seeds them from the run's seed and its number.
"""
import pickle
from pathlib import Path
from typing import Any

import torch

from timm_lean.checkpoint.files import atomic_file
from timm_lean.errors import CheckpointError

__all__ = ['RESUME_FILE', 'load_state', 'save_state']

RESUME_FILE = 'resume.pt'


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
        saved, epoch = state['recipe'], state['epoch']
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as e:
        raise CheckpointError(f'{path} is damaged: {e}. Start a new run in another --output.') from e
    if saved != recipe:
        raise CheckpointError(
            f'{path} (epoch {epoch}) is from another model: {saved["architecture"]!r} with {saved["model_args"]}, '
            f'not {recipe["architecture"]!r} with {recipe["model_args"]}. Give the same --model and classes, or '
            'start a new run in another --output.')
    return state
