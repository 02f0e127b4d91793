"""Train a changed network a little further, by the same engine as any training."""
import shutil
import tempfile
from pathlib import Path
from typing import Any

from timm_lean.checkpoint.files import atomic_file
from timm_lean.errors import LeanError

from .config import TrainConfig
from .data import open_dataset
from .engine import train

__all__ = ['check_finetune', 'finetune']


def finetune(checkpoint: str | Path, *, epochs: int, lr: float = 0.01, **settings: Any) -> float:
    """Train a checkpoint further and replace it by the last epoch's network, of the same structure.

    A set smaller than a batch is trained on in one batch of all its images.

    Args:
        checkpoint: The file; it stays as it is if training fails.
        epochs: Passes over the training images.
        lr: Learning rate at the start; it falls to 0 along a cosine.
        **settings: More settings of `TrainConfig`, such as `data_dir`, `device`, `distill` and `batch_size`.

    Returns:
        Top-1 accuracy of the result in per cent.

    Raises:
        LeanError: Settings that cannot be met.
    """
    config = check_finetune(epochs=epochs, lr=lr, **settings)
    checkpoint = Path(checkpoint)
    with tempfile.TemporaryDirectory(dir=checkpoint.parent, prefix='.finetune-') as run:
        config.model, config.output = str(checkpoint), run
        result = train(config)
        with atomic_file(checkpoint) as temporary:
            shutil.copyfile(Path(run) / 'last.safetensors', temporary)
    return result['last']['eval_top1']


def check_finetune(*, epochs: int, lr: float = 0.01, **settings: Any) -> TrainConfig:
    """The config that `finetune` trains with, for a model yet to be named; so that mistakes show before the change.

    Raises:
        LeanError: Settings that cannot be met, or too few images.
    """
    if not epochs >= 1:
        raise LeanError(f'Fine-tuning takes at least 1 epoch, got {epochs}.')
    config = TrainConfig.from_args({**settings, 'model': '-', 'epochs': epochs, 'lr': lr})
    images = len(open_dataset(config.data, config.data_dir, 'train', limit=config.train_images))
    if images < 2:
        raise LeanError(f'Fine-tuning needs at least 2 training images, got {images}.')
    config.batch_size = min(config.batch_size, images)
    if (config.mixup or config.cutmix) and config.batch_size % 2:
        config.batch_size -= 1  # they pair images
    return config
