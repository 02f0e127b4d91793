"""What a command works on: the network that was named, with weights that are no surprise, and where it runs."""
import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from .arguments import given

__all__ = ['data_options', 'device_of', 'finish', 'is_detector', 'open_model', 'progress']

_DETECTOR_COMMANDS = 'info, predict, compress, share, prune and export'


def open_model(args: argparse.Namespace, source: str | None = None) -> Any:
    """The network that the command line names, in eval mode.

    Args:
        args: With `pretrained` and `random_weights`.
        source: The network; `args.model` if None.

    Raises:
        LeanError: No such network, a detector, or a bare timm name without a word on its weights.
    """
    import timm

    from timm_lean.checkpoint.format import load_any
    from timm_lean.errors import LeanError
    source = args.model if source is None else source
    if is_detector(source):
        raise LeanError(f'{source} is a detector, and `timm-lean {args.command}` is for classification networks. '
                        f'Commands for detectors: {_DETECTOR_COMMANDS}; test it by tools/test_det.py.')
    if getattr(args, 'trust_imports', None):
        raise LeanError(f'--trust-imports is for detectors, and {source[:100]!r} is none.')
    named = timm.is_model(source.split('.')[0]) and not Path(source).is_file()
    if named and not (args.pretrained or args.random_weights):
        raise LeanError(f"{source} is a name without weights. Give --pretrained for timm's weights, a checkpoint file "
                        'for your own, or --random-weights if new ones are meant.')
    return load_any(source, pretrained=named and args.pretrained)


def is_detector(source: str) -> bool:
    """Whether this is a detector's folder or checkpoint; MMDetection is not imported to tell."""
    from safetensors import SafetensorError, safe_open
    path = Path(source)
    if path.is_dir():
        return (path / 'config.py').is_file()
    if not path.is_file():  # asked first: safetensors before 0.8 panics at names that no file can have
        return False
    try:
        with safe_open(path, framework='pt') as f:
            return 'timm_lean_detector' in (f.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False  # whoever reads it as a network says what is wrong


def device_of(args: argparse.Namespace) -> Any:
    """The device of `--device`."""
    from timm_lean.training.device import resolve_device
    return resolve_device(**given(args, name='device'))


def data_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of `add_data`, checked, as keywords of `evaluate_source` and `open_eval_loader`."""
    from timm_lean.training.config import TrainConfig
    from timm_lean.training.settings import check_setting
    names = ('data', 'data_dir', 'img_size', 'batch_size', 'workers')
    options = {name: check_setting(TrainConfig, name, value) for name, value in given(args, *names).items()}
    return {**options, 'device': device_of(args)}


def progress(args: argparse.Namespace) -> Any:
    """Where a command works: with --json, what it prints meanwhile goes to stderr."""
    return contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext()


def finish(args: argparse.Namespace, result: Any, text: str) -> None:
    """Print a result, as text or with --json as that."""
    print(json.dumps(result, indent=2) if args.json else text)
