"""The folder of a training run: which one, and that no other run has it."""
from pathlib import Path

from timm_lean.errors import LeanError

from .config import TrainConfig
from .state import RESUME_FILE

__all__ = ['choose_directory']


def choose_directory(config: TrainConfig) -> Path:
    """The folder that a run is to write to, or to continue in: `output`, or `output/MODEL`, numbered upwards.

    Raises:
        LeanError: It holds a run already, and the configuration does not say to continue it.
    """
    directory = Path(config.output) if config.output else _numbered(_label(config.model), config.resume)
    if (directory / RESUME_FILE).exists() and not config.resume:
        raise LeanError(f'{directory} already holds a run. Continue it by --resume or choose another --output.')
    return directory


def _label(model: str) -> str:
    return Path(model.partition(':')[2] or model).name.removesuffix('.safetensors')


def _numbered(label: str, resume: bool) -> Path:
    """The first of output/LABEL, output/LABEL-2, ... without a run; the last one with a run to resume."""
    last = None
    number = 1
    while True:
        path = Path('output') / (label if number == 1 else f'{label}-{number}')
        if not (path / RESUME_FILE).exists():
            return last if resume and last is not None else path
        last = path
        number += 1
