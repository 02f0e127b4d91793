"""The accuracy of many networks on the same images: a config's own evaluator without a Runner for each of them."""
import contextlib
import copy
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger

from timm_lean.errors import LeanError

from .checks import registry_errors
from .fit_machine import prepare

__all__ = ['average_precision', 'headline', 'judging_split']


def judging_split(cfg: Config) -> str | None:
    """The split whose images and evaluator judge detectors: the validation if it has both, else the test."""
    return next((s for s in ('val', 'test') if cfg.get(f'{s}_dataloader') and cfg.get(f'{s}_evaluator')), None)


def average_precision(detector: Any, images: int | None = None) -> Callable[[nn.Module], float] | None:
    """A function that gives the AP of detectors, in per cent, by a config's own evaluator.

    Args:
        detector: With `cfg`; its data and evaluator count, those of the validation if there are any, else of the test.
        images: So many of them, spread over the whole set; all if None. They are read once and kept.

    Returns:
        A function of a detector; None if the config evaluates nothing.

    Raises:
        LeanError: The data are not there, or there are no images.
    """
    if images is not None and (type(images) is not int or images < 1):
        raise LeanError(f'Judging needs a whole number of images of at least 1, got {images!r}.')
    cfg = copy.deepcopy(detector.cfg)
    split = judging_split(cfg)
    if split is None:
        return None
    prepare(cfg, (split,))
    loader, metrics = cfg[f'{split}_dataloader'], cfg[f'{split}_evaluator']
    for metric in metrics if isinstance(metrics, (list, tuple)) else [metrics]:
        metric.pop('outfile_prefix', None)  # where to write is not the file's to say
    with registry_errors(), _quiet():
        try:
            dataset = DATASETS.build(loader.dataset)
        except FileNotFoundError as e:
            raise LeanError(f'The {split} set has no {e.filename}. Give the folder of the data by --data-root '
                            '(data_root).') from e
        evaluator = Evaluator(metrics)
    evaluator.dataset_meta = dataset.metainfo
    if not len(dataset):
        raise LeanError(f'The {split} set of the config has no images.')
    count = len(dataset) if images is None else min(images, len(dataset))
    samples = [dataset[int(i * len(dataset) / count)] for i in range(count)]
    if count < len(dataset):
        for metric in evaluator.metrics:
            if hasattr(metric, 'img_ids'):  # COCO's counts all images of the file as looked at
                metric.img_ids = [sample['data_samples'].img_id for sample in samples]
    size = loader.get('batch_size', 1)
    batches = [dict(inputs=[s['inputs'] for s in part], data_samples=[s['data_samples'] for s in part])
               for part in (samples[i:i + size] for i in range(0, count, size))]

    @torch.no_grad()
    def score(network: Any) -> float:
        network.eval()
        with _quiet():
            for batch in batches:
                evaluator.process(network.test_step(copy.deepcopy(batch)), batch)
            return 100 * headline(evaluator.evaluate(count))

    return score


def headline(scores: dict[str, float]) -> float:
    """The first of an evaluator's metrics, which is the one that papers give; 0 where nothing was found at all."""
    return float(next(iter(scores.values()), 0.))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tables that pycocotools prints and MMEngine logs."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
