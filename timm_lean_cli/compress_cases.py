"""What `timm-lean compress` works with: a classification network and its images, or a detector and its config."""
import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .arguments import given
from .changing import finetuned, finetuning_options
from .changing_detector import check_detector_flags
from .opening import data_options, open_model

__all__ = ['Case', 'detector_case', 'network_case']

_CALIBRATION_IMAGES = 512
_CALIBRATION_IMAGES_DETECTOR = 64  # they are large, and every candidate is calibrated
_JUDGING_IMAGES = 2000
_JUDGING_IMAGES_DETECTOR = 200


@dataclass
class Case:
    """What is compressed, and by what.

    Attributes:
        model: The network.
        images: Batches to calibrate with.
        judge: Gives the function that judges networks, None if there is none; reads its images.
        finetune: Trains a network further; None if that is not wanted.
        save: Writes a network: `(network, path, weights)`.
        scores: Of a network on all images, by name; none if not asked for or without labels.
        unit: How they are shown.
    """
    model: Any
    images: list[Any]
    judge: Callable[[], Callable[[Any], float] | None]
    finetune: Callable[[Any], Any] | None
    save: Callable[[Any, Path, str], Any]
    scores: Callable[[Any], dict[str, float]]
    unit: str


def network_case(args: argparse.Namespace, folder: Path) -> Case:
    """A classification network; `folder` is where checkpoints may lie meanwhile."""
    import torch

    from timm_lean.checkpoint.format import save_model
    from timm_lean.errors import LeanError
    from timm_lean.training.data import SplitError, open_eval_loader
    from timm_lean.training.evaluate import evaluate, evaluate_source, labelled_loader
    options = data_options(args)
    if not (args.data or args.data_dir):
        raise LeanError('compress needs images: --data-dir DIR, or --data digits.')
    tuning = finetuning_options(args)
    model = open_model(args).to(options['device'])
    unlabelled = None
    try:
        judging = labelled_loader(args.model, model, **options, limit=args.judge or _JUDGING_IMAGES)
    except SplitError as e:
        if tuning or args.max_drop is not None:
            raise LeanError(f'{"--finetune-epochs" if tuning else "--max-drop"} needs labels: {e}') from e
        unlabelled = str(e)
    images = [x for x, _ in open_eval_loader(
        model, **options, split='train', limit=args.calibrate or _CALIBRATION_IMAGES, labels=bool(tuning))]
    if unlabelled:  # some of the batches judge: each gets images of all classes, by which a folder is sorted
        x = torch.cat(images)
        count = max(len(images), min(len(x), 4))
        images = [x[i::count] for i in range(count)]

    def judge() -> Callable[[Any], float] | None:
        if unlabelled:
            print(f'{unlabelled} Networks are judged by how often they name the class that the original names, on a '
                  'quarter of the calibration images.', file=sys.stderr)
            return None
        batches = list(judging)  # decoded once
        return lambda network: evaluate(network, batches, options['device'])['top1']

    def scores(network: Any) -> dict[str, float]:
        if unlabelled:
            return {}
        return {'top1': evaluate_source(args.model, network, progress=sys.stderr.isatty(), **options)['top1']}

    return Case(
        model, images, judge,
        finetuned(args, model, tuning, folder) if tuning else None,
        lambda network, path, weights: save_model(network, path, weights=weights), scores, '%')


def detector_case(args: argparse.Namespace) -> Case:
    """A detector: images and accuracy are those of its config."""
    from timm_lean.errors import LeanError
    from timm_lean.mmdet import average_precision, calibration_images, open_detector, write_detector
    from timm_lean.mmdet.runs import detector_scores, finetune_detector, set_data
    from timm_lean.training.device import resolve_device
    check_detector_flags(args)
    if args.evaluate and args.dry_run:
        raise LeanError('--dry-run evaluates nothing: leave out --evaluate.')
    model: Any = open_detector(args.model, args.det_config, **given(args, 'trust_imports'))
    set_data(model, args.data_root)
    model = model.to(resolve_device(**given(args, name='device')))

    def judge() -> Callable[[Any], float] | None:
        score = average_precision(model, args.judge or _JUDGING_IMAGES_DETECTOR)
        if score is None:
            print('The config has no evaluation: networks are judged by the outputs of their heads on a quarter of the '
                  'calibration images.', file=sys.stderr)
        return score

    def finetune(network: Any) -> Any:
        return finetune_detector(network, args.finetune_epochs, args.finetune_lr)

    return Case(
        model, list(calibration_images(model, args.calibrate or _CALIBRATION_IMAGES_DETECTOR)), judge,
        None if args.finetune_epochs is None else finetune,
        lambda network, path, weights: write_detector(network, path, weights),
        detector_scores if args.evaluate else lambda network: {}, '')
