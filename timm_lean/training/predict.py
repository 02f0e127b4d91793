"""Classes of single images."""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform
from tqdm import tqdm

from timm_lean.errors import LeanError

from .data import model_data_config

__all__ = ['predict']


@torch.no_grad()
def predict(
        model: nn.Module, images: Sequence[str], device: torch.device, top: int = 5, progress: bool = False,
) -> list[dict[str, Any]]:
    """The most probable classes of images.

    Args:
        model: A classification model; its pretrained_cfg says how images are prepared and what classes are called.
        images: Paths.
        device: Where to run.
        top: Classes per image.
        progress: Show a progress bar.

    Returns:
        For each image `{'image': path, 'top': [{'class': name, 'index': i, 'probability': p}, ...]}`.

    Raises:
        LeanError: An image cannot be read or the model has no classes.
    """
    if not getattr(model, 'num_classes', 0):
        raise LeanError('The model has no classifier (num_classes=0), so it cannot name classes.')
    model = model.to(device).eval()
    config = model_data_config(model)
    transform = create_transform(**{k: config[k] for k in ('input_size', 'interpolation', 'mean', 'std', 'crop_pct')})
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    names = cfg.get('label_names') or [str(i) for i in range(int(model.num_classes))]  # type: ignore[arg-type]
    mode = 'L' if config['input_size'][0] == 1 else 'RGB'
    results = []
    for path in tqdm(images, 'predict', unit=' images', disable=not progress, leave=False):
        try:
            with Image.open(path) as f:
                image = f.convert(mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise LeanError(f'The image {path} cannot be read: {e}') from e
        probabilities = model(transform(image).unsqueeze(0).to(device)).float().softmax(1)[0]
        values, indices = probabilities.topk(min(top, len(probabilities)))
        results.append({'image': path, 'top': [
            {'class': names[i], 'index': i, 'probability': v}
            for v, i in zip(values.tolist(), indices.tolist(), strict=True)]})
    return results
