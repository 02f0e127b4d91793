"""Train a changed network a little further, by the same engine as any training."""
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm_lean.checkpoint.files import atomic_file
from timm_lean.errors import LeanError

from .config import TrainConfig
from .engine import train

__all__ = ['finetune']


def finetune(checkpoint: str | Path, epochs: int, lr: float = 0.01, settings: Mapping[str, Any] | None = None) -> float:
    """Train a checkpoint further and replace it by the last epoch's network, of the same structure.

    Args:
        checkpoint: The file; it stays as it is if training fails.
        epochs: Passes over the training images.
        lr: Learning rate at the start; it falls to 0 along a cosine.
        settings: More settings of `TrainConfig`, such as `data_dir`, `device` and `batch_size`.

    Returns:
        Top-1 accuracy of the result in per cent.

    Raises:
        LeanError: Settings that cannot be met.
    """
    if epochs < 1:
        raise LeanError(f'Fine-tuning takes at least 1 epoch, got {epochs}.')
    checkpoint = Path(checkpoint)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix='.finetune-') as run:
        result = train(TrainConfig.from_args({
            **(settings or {}), 'model': str(checkpoint), 'epochs': epochs, 'lr': lr, 'output': run}))
        with atomic_file(checkpoint) as temporary:
            shutil.copyfile(Path(run) / 'last.safetensors', temporary)
    return result['last']['eval_top1']
