"""The way of `prune` and `share`: open, change, save, train a little further, and compare what was with what is."""
import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .arguments import given
from .figures import Figures, figures_table
from .opening import data_options, finish, open_model, progress

__all__ = ['calibration_images', 'change_network', 'finetuned', 'finetuning_options']

_CALIBRATION_IMAGES = 512


def change_network(
        args: argparse.Namespace,
        title: str,
        change: Callable[[Any, Any, Any], Any],
        check: Callable[[Any], None] = lambda model: None,
) -> None:
    """Run a command that changes the structure of a network.

    Args:
        args: Those of `add_model`, `add_calibration`, `add_finetuning` and `add_json`, and `output`.
        title: What the changed network is called in the table.
        change: `(network, example images [1, C, H, W], what to calibrate with or None)` to a new network, with a
            `lean_report`.
        check: Called with the network before any work is done.

    Raises:
        LeanError: Settings or a network that will not do; nothing is written then.
    """
    import torch
    from timm.models import get_model_input_config

    from timm_lean.checkpoint.files import output_file
    from timm_lean.checkpoint.format import save_model
    output = output_file(args.output, '.safetensors')
    options = data_options(args)
    tuning = finetuning_options(args)
    model = open_model(args)
    check(model)
    images = calibration_images(args, model, options, training=bool(tuning))
    judged = _can_evaluate(args, model, options, needed=images is None or bool(tuning))
    x = torch.randn(1, *get_model_input_config(model)['input_size'], generator=torch.Generator().manual_seed(0))
    with progress(args):
        columns = {'before': _figures(args, model, x, Path(args.model), options, judged)}
        device = 'cpu' if images is None else options['device']
        new = change(model.to(device), x.to(device), images).cpu()
        model.cpu()
        if not args.json:
            print(new.lean_report, flush=True)
            if images is not None:
                print(new.calibration_report.summary, flush=True)
        save_model(new, output)
        columns[title] = _figures(args, new, x, output, options, judged)
        if tuning:
            tuned = finetuned(args, model, tuning, output.parent)(new)
            save_model(tuned, output)
            columns['fine-tuned'] = _figures(args, tuned, x, output, options, judged)
    result = {'output': str(output), 'report': new.lean_report.to_dict(),
              **({} if images is None else {'calibration': new.calibration_report.to_dict()}),
              **{name: vars(figures) for name, figures in columns.items()}}
    finish(args, result, f'{figures_table(columns)}\n{output}')


def calibration_images(
        args: argparse.Namespace, model: Any, options: dict[str, Any], training: bool = False,
) -> Any:
    """Training images to calibrate with; None without data or with `--calibrate 0`.

    Args:
        args: Those of `add_calibration` and `add_data`.
        model: The network.
        options: `data_options(args)`.
        training: Whether the images are trained on, too: they cannot be missing then, and have labels.
    """
    from timm_lean.calibration import Calibration
    from timm_lean.errors import LeanError
    from timm_lean.training.data import SplitError, open_eval_loader
    number = args.calibrate
    if number is not None and number < 0:
        raise LeanError(f'--calibrate must be a number of images of at least 0, got {number}.')
    there = bool(args.data or args.data_dir)
    if number and not there:
        raise LeanError('--calibrate needs training images: --data-dir DIR, or --data digits.')
    if number == 0 or not there:
        if args.calibrate_positions is not None:
            raise LeanError('--calibrate-positions is for calibration: it needs --data-dir DIR or --data digits, '
                            'without --calibrate 0.')
        return None
    try:
        loader = open_eval_loader(
            model, **options, split='train', limit=number or _CALIBRATION_IMAGES, labels=training)
    except SplitError as e:
        if number is not None or training:
            raise
        print(f'not calibrated: {e}', file=sys.stderr)
        return None
    return Calibration(loader, progress=sys.stderr.isatty(), **given(args, positions='calibrate_positions'))


def _can_evaluate(args: argparse.Namespace, model: Any, options: dict[str, Any], needed: bool) -> bool:
    """Whether there are evaluation images with the model's classes; where not, a note or, if `needed`, an error."""
    from timm_lean.errors import LeanError
    from timm_lean.training.evaluate import labelled_loader
    if not (args.data or args.data_dir):
        return False
    try:
        labelled_loader(args.model, model, **options)
    except LeanError as e:
        if needed:
            raise
        print(f'accuracy not measured: {e}', file=sys.stderr)
        return False
    return True


def finetuning_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `finetune`, all checked; empty if nothing is to be trained."""
    from dataclasses import fields

    from timm_lean.errors import LeanError
    from timm_lean.training import TrainConfig
    from timm_lean.training.finetune import check_finetune
    names = {f.name for f in fields(TrainConfig)} - {'model', 'output', 'prune', 'pretrained'}
    names &= vars(args).keys()
    settings = given(args, *names, lr='finetune_lr')
    if args.finetune_epochs is None:
        read = ('data', 'data_dir', 'img_size', 'batch_size', 'workers', 'device', *_USED_WITHOUT)
        if alone := [name for name in settings if name not in read]:
            flag = 'finetune-lr' if alone[0] == 'lr' else alone[0].replace('_', '-')
            raise LeanError(f'--{flag} is for fine-tuning: it needs --finetune-epochs.')
        return {}
    if not (args.data or args.data_dir):
        raise LeanError('--finetune-epochs needs data: --data-dir DIR, or --data digits.')
    tuning = {'epochs': args.finetune_epochs, **settings}
    check_finetune(**{**tuning, **({'distill': 'the original'} if args.distill is True else {})})
    return tuning


def finetuned(args: argparse.Namespace, original: Any, tuning: dict[str, Any], folder: Path) -> Callable[[Any], Any]:
    """A function that trains a network further and returns it.

    Args:
        args: Those of `add_finetuning`.
        original: The teacher, if `--distill` names none.
        tuning: `finetuning_options(args)`.
        folder: Where checkpoints may lie meanwhile.
    """
    from timm_lean.checkpoint.format import load_any, save_model
    from timm_lean.training.finetune import finetune

    def tune(model: Any) -> Any:
        with tempfile.TemporaryDirectory(dir=folder, prefix='.finetune-') as name:
            options, file = dict(tuning), Path(name) / 'network.safetensors'
            if options.get('distill') is True:
                options['distill'] = str(Path(name) / 'original.safetensors')
                save_model(original.cpu(), options['distill'])
            save_model(model.cpu(), file)
            finetune(file, **options)
            return load_any(str(file))
    return tune


_USED_WITHOUT = ('seed',)  # of training, that the change itself uses too


def _figures(
        args: argparse.Namespace, model: Any, x: Any, path: Path, options: dict[str, Any], judged: bool) -> Figures:
    from timm_lean.measure import count_macs
    from timm_lean.training.evaluate import evaluate_source
    figures = Figures.of(model, count_macs(model, x.shape), path)
    if judged:
        figures.top1 = evaluate_source(args.model, model, progress=sys.stderr.isatty(), **options)['top1']
        model.cpu()
    return figures
