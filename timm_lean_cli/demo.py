"""`timm-lean demo`: a user's story in one go on embedded data, a detector included."""
import argparse

from .arguments import add_json, given
from .opening import finish, progress

HELP = 'train a network on the embedded digits, compress it to a target, reload it'


def add_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument('--output', default='output/demo', help='folder for the results (output/demo if not given)')
    p.add_argument('--epochs', type=int, help='of training (default 8)')
    p.add_argument('--detection', action=argparse.BooleanOptionalAction,
                   help='with a detector (if MMDetection is installed, where nothing is said)')
    add_json(p)


def run(args: argparse.Namespace) -> None:
    import importlib.util
    from pathlib import Path

    from .demo_steps import compress_detector, demo
    detection = importlib.util.find_spec('mmdet') is not None if args.detection is None else args.detection
    with progress(args):
        result = demo(Path(args.output), **given(args, 'epochs'))
        if detection:
            from timm_lean.mmdet.demo import detection_demo
            print('\nAnd a detector')
            result['detector'] = compress_detector(detection_demo(Path(args.output) / 'detection'))
        else:
            print("MMDetection is not installed (pip install 'timm-lean[mmdet]') or not wanted: the detector's part is "
                  'left out.')
    if args.json:  # else all is told
        finish(args, result, '')
