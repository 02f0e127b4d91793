"""Arguments that several commands take, each written once.

None of them has a default here: what is not given is None and is not passed on, so that the library's defaults hold.
"""
import argparse
from typing import Any

__all__ = [
    'add_calibration', 'add_data', 'add_detector', 'add_finetuning', 'add_json', 'add_layers', 'add_model',
    'add_training', 'add_trust', 'add_weights', 'given',
]

MODEL = 'timm name, checkpoint file or local-dir:DIR'


def given(args: argparse.Namespace, *names: str, **renamed: str) -> dict[str, Any]:
    """Those of some arguments that were given, as keywords; `new='old'` passes `args.old` on as `new`."""
    pairs = {**{name: name for name in names}, **renamed}
    return {new: getattr(args, old) for new, old in pairs.items() if getattr(args, old) is not None}


def add_model(p: argparse.ArgumentParser, help: str = MODEL) -> None:
    """The network a command works on, and where the weights of a bare name come from."""
    p.add_argument('model', help=help)
    add_weights(p)


def add_weights(p: argparse.ArgumentParser) -> None:
    """Where the weights of a timm name come from."""
    weights = p.add_mutually_exclusive_group()
    weights.add_argument('--pretrained', action='store_true', help="a timm name with timm's weights (downloaded)")
    weights.add_argument('--random-weights', action='store_true', help='a timm name with new, random weights')


def add_trust(p: argparse.ArgumentParser) -> None:
    """Code that a detector's file needs, and that only its user can vouch for."""
    p.add_argument('--trust-imports', action='append', metavar='MODULE',
                   help="detector: import this package or module of yours if the file's config asks for it; its code "
                        'runs (repeatable)')


def add_json(p: argparse.ArgumentParser) -> None:
    p.add_argument('--json', action='store_true', help='print the result as JSON')


def add_layers(p: argparse._ActionsContainer) -> None:
    """Which layers are changed or looked at."""
    p.add_argument('--include', action='append', metavar='PATTERN', help='only these layers (repeatable)')
    p.add_argument('--exclude', action='append', metavar='PATTERN', help='layers to leave alone (repeatable)')


def add_data(p: argparse._ActionsContainer, folder: str = 'folder with val/ or test/, or of class folders') -> None:
    """Images, and how they are read."""
    p.add_argument('--data', choices=['digits', 'folder'], help="'digits' are embedded; 'folder' needs --data-dir")
    p.add_argument('--data-dir', metavar='DIR', help=folder)
    p.add_argument('--img-size', type=int, metavar='N', help="image size (default: the model's)")
    p.add_argument('--batch-size', type=int, metavar='N', help='images per batch and process (default 128)')
    p.add_argument('--workers', type=int, metavar='N', help='data loading processes (default 2)')
    p.add_argument('--device', help='auto (default), cpu, cuda, cuda:N, ...')


def add_calibration(
        p: argparse.ArgumentParser, positions: bool = True, default: str = '512 with data, 0: not') -> None:
    """Training images by which a changed network is repaired at once, see `timm_lean.calibration`."""
    p.add_argument('--calibrate', type=int, metavar='N',
                   help=f'repair the result at once by N training images without labels (default {default})')
    if not positions:
        return
    p.add_argument('--calibrate-positions', type=int, metavar='N',
                   help='fit each layer to N positions of each of these images at most (default 64)')


def add_detector(p: argparse.ArgumentParser, part: bool = True) -> None:
    """What a detector is changed by: its config, the part of it, its data."""
    detector = p.add_argument_group('detectors of MMDetection')
    detector.add_argument('--det-config', metavar='CONFIG', help="the detector's config, if its file does not say it")
    if part:
        detector.add_argument('--target', nargs='+', metavar='NAME',
                              help='only backbone, neck, bbox_head or another module (default: the whole detector)')
    detector.add_argument('--data-root', metavar='DIR', help="the data's folder, instead of the config's")
    detector.add_argument('--evaluate', action='store_true',
                          help="accuracy on the config's test set, by the config's evaluator")


def add_finetuning(p: argparse.ArgumentParser) -> None:
    """Images for accuracy, and training after a change, with all that `train` can do."""
    add_data(p.add_argument_group('images, to calibrate and evaluate with'),
             'folder with train/, in which calibration needs no class folders, and val/ or test/; or of images alone')
    tuning = p.add_argument_group('fine-tuning (the flags of `timm-lean train`)')
    tuning.add_argument('--finetune-epochs', type=int, metavar='N', help='train the result so long')
    tuning.add_argument('--finetune-lr', type=float, metavar='LR', help='learning rate of that (default 0.01)')
    tuning.add_argument('--distill', nargs='?', const=True, metavar='TEACHER',
                        help='learn the features of this network; of the original if none is named')
    add_training(tuning)


def add_training(p: argparse._ActionsContainer) -> None:
    """Settings of a training beside model, data, epochs, learning rate, teacher and output; see `TrainConfig`."""
    def flag(name: str, help: str, **kwargs: Any) -> None:
        p.add_argument(name, help=help, **kwargs)

    def switch(name: str, help: str) -> None:
        p.add_argument(name, help=help, action=argparse.BooleanOptionalAction)

    flag('--train-images', 'use only so many training images', type=int, metavar='N')
    switch('--cache', 'decode all images once and keep them on the device')
    flag('--grad-accum', 'steps per update (default 1)', type=int, metavar='N')
    flag('--opt', 'timm optimizer (default sgd)')
    flag('--momentum', 'default 0.9', type=float)
    flag('--weight-decay', 'default 0.0005', type=float)
    switch('--decay-all', 'weight decay on biases and norms too')
    flag('--sched', 'learning rate schedule: cosine (default), multistep, poly or constant')
    flag('--milestones', 'epochs at which multistep decays', type=int, nargs='+', metavar='EPOCH')
    flag('--decay-rate', 'default 0.1', type=float)
    flag('--warmup-epochs', 'default 0', type=int)
    flag('--min-lr', 'default 0', type=float)
    flag('--reg', 'regularizer, e.g. basis_ortho=10 (repeatable)', action='append', metavar='NAME=WEIGHT')
    flag('--distill-weight', 'weight of the mean squared error of features (default 1)', type=float, metavar='W')
    flag('--smoothing', 'label smoothing (default 0)', type=float)
    flag('--mixup', 'mixup alpha (default 0)', type=float)
    flag('--cutmix', 'cutmix alpha (default 0)', type=float)
    flag('--aug', 'crop (default), rrc or none')
    flag('--hflip', 'probability of a flip (0.5 if not given, for digits 0)', type=float)
    flag('--auto-augment', 'timm policy, e.g. rand-m9-mstd0.5 (with --aug rrc)')
    flag('--re-prob', 'random erasing (default 0)', type=float)
    flag('--amp', 'mixed precision: bf16 or fp16')
    switch('--ema', 'evaluate an exponential moving average of the weights')
    flag('--ema-decay', 'default 0.9998', type=float)
    flag('--clip-grad', 'gradient norm', type=float)
    switch('--compile', 'torch.compile the model')
    switch('--channels-last', 'memory format')
    flag('--seed', 'of everything random (default 0)', type=int)
