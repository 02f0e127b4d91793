"""The way of `prune` and `share` with a detector: open, change, save, train a little further, and compare."""
import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .arguments import given
from .figures import Figures, figures_table
from .opening import finish, is_detector, progress

__all__ = ['change_detector', 'check_detector_flags', 'detector_calibration', 'names_detector']

# of the flags that classification networks take too, those that detectors take
_COMMON = ('calibrate', 'finetune_epochs', 'finetune_lr', 'device', 'seed')


def names_detector(args: argparse.Namespace, own: Sequence[str] = ('target', 'data_root', 'evaluate')) -> bool:
    """Whether the command line names a detector; its `own` flags given with another network are an error."""
    from timm_lean.errors import LeanError
    if args.det_config or is_detector(args.model):
        return True
    if wrong := [flag for flag in own if getattr(args, flag)]:
        raise LeanError(f'--{wrong[0].replace("_", "-")} is for detectors, and {args.model} is none that says its '
                        'config. Give --det-config CONFIG for a .pth; classification networks take --data-dir.')
    return False


def change_detector(
        args: argparse.Namespace, title: str, verb: Callable[..., Any], options: dict[str, Any],
        check: Callable[[Any], None] = lambda model: None,
) -> Any:
    """Run a command that changes the structure of a detector.

    Args:
        args: Those of `change_network` and `add_detector`.
        title: What the changed detector is called in the table.
        verb: The technique, see `timm_lean.mmdet.lean_detector`.
        options: For it.
        check: Called with the detector before any work is done.

    Returns:
        The changed detector.

    Raises:
        LeanError: Settings or a detector that will not do; nothing is written then.
    """
    from timm_lean.checkpoint.files import output_file
    from timm_lean.mmdet import lean_detector, open_detector
    from timm_lean.mmdet.detector import write_detector
    from timm_lean.mmdet.runs import detector_scores, finetune_detector, set_data
    from timm_lean.training.device import resolve_device
    check_detector_flags(args)
    output = output_file(args.output, '.safetensors')
    device = resolve_device(**given(args, name='device'))
    model: Any = open_detector(args.model, args.det_config, **given(args, 'trust_imports'))
    set_data(model, args.data_root)
    check(model)
    scores = detector_scores if args.evaluate else None
    with progress(args):
        images = detector_calibration(args, model.to(device))
        columns = {'before': _figures(model, Path(args.model), scores)}
        new: Any = lean_detector(model.to(device), verb, calibration=images, **given(args, 'target'), **options).cpu()
        if not args.json:
            print(new.lean_report, flush=True)
            if images is not None:
                print(new.calibration_report.summary, flush=True)
        write_detector(new, output)
        columns[title] = _figures(new, output, scores)
        if args.finetune_epochs is not None:
            tuned = finetune_detector(new, args.finetune_epochs, args.finetune_lr)
            write_detector(tuned, output)
            columns['fine-tuned'] = _figures(tuned, output, scores)
    result = {'output': str(output), 'report': new.lean_report.to_dict(),
              **({} if images is None else {'calibration': new.calibration_report.to_dict()}),
              **{name: vars(figures) for name, figures in columns.items()}}
    finish(args, result, f'{figures_table(columns)}\n{output}')
    return new


def detector_calibration(args: argparse.Namespace, model: Any) -> Any:
    """What to calibrate with; None with `--calibrate 0`, and where the data are not there and were not asked for."""
    from timm_lean.calibration import Calibration
    from timm_lean.errors import LeanError
    from timm_lean.mmdet.runs import CALIBRATION_IMAGES, calibration_images
    if args.calibrate is not None and args.calibrate < 0:
        raise LeanError(f'--calibrate must be a number of images of at least 0, got {args.calibrate}.')
    if args.calibrate == 0:
        return None
    try:
        images = calibration_images(model, args.calibrate or CALIBRATION_IMAGES)
    except LeanError as e:
        if args.calibrate or args.data_root:
            raise
        print(f'not calibrated: {e}', file=sys.stderr)
        return None
    return Calibration(images, progress=sys.stderr.isatty(), **given(args, positions='calibrate_positions'))


def check_detector_flags(args: argparse.Namespace) -> None:
    from timm_lean.errors import LeanError
    from timm_lean.training import TrainConfig
    flags = [*vars(TrainConfig)['__dataclass_fields__'], 'pretrained', 'random_weights', 'distill']
    wrong = [flag for flag in flags if flag not in (*_COMMON, 'model', 'output', 'prune', 'lr', 'epochs')
             and getattr(args, flag, None) not in (None, False)]
    if wrong:
        raise LeanError(f'--{wrong[0].replace("_", "-")} is for classification networks. Data and training of a '
                        'detector are those of its config; --data-root moves its data.')
    if args.finetune_lr is not None and args.finetune_epochs is None:
        raise LeanError('--finetune-lr is for fine-tuning: it needs --finetune-epochs.')


def _figures(model: Any, path: Path, scores: Callable[[Any], dict[str, float]] | None) -> Figures:
    from timm_lean.mmdet.report import detector_macs
    from timm_lean.mmdet.scoring import headline
    figures = Figures.of(model, detector_macs(model), path)
    if scores:
        figures.ap = headline(scores(model))
    return figures
