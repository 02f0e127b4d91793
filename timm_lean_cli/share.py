"""`timm-lean share`: convert a network to shared bases, and say what it cost and saved."""
import argparse
from typing import Any

from .arguments import add_calibration, add_detector, add_finetuning, add_json, add_layers, add_model, add_trust, given
from .changing import change_network
from .changing_detector import change_detector, names_detector

HELP = 'convert a model to shared filter bases, from its own weights'


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_model(p, 'timm name, checkpoint file, local-dir:DIR, or a detector')
    p.add_argument('-o', '--output', required=True, metavar='FILE', help='the converted checkpoint')
    size = p.add_mutually_exclusive_group(required=True)
    size.add_argument('--params', type=float, metavar='SHARE', help="of the original's parameters, e.g. 0.5")
    size.add_argument('--energy', type=float, metavar='SHARE', help='of the squared norm that each basis keeps')
    size.add_argument('--shared-rank', type=int, metavar='N', help='filters of every basis')
    p.add_argument('--unique-rank', type=int, metavar='N', help='more filters per layer (default 0)')
    p.add_argument('--dual', action='store_const', const=True,
                   help="a basis each for a block's first and second convolution")
    p.add_argument('--bn', action='store_true', help='batch norms behind the filters, set by training images')
    p.add_argument('--alone', action=argparse.BooleanOptionalAction,
                   help='factorize layers without a partner too (default: not with --shared-rank)')
    p.add_argument('--classifier', action='store_const', const=True, help='convert the classifier too')
    p.add_argument('--stages', type=int, nargs='+', metavar='N', help="as timm's feature levels; all if not given")
    add_layers(p)
    add_json(p)
    add_calibration(p)
    add_finetuning(p)
    add_detector(p)
    add_trust(p)


def run(args: argparse.Namespace) -> None:
    from timm_lean.errors import LeanError
    from timm_lean.sharing import share
    options = given(args, 'shared_rank', 'energy', 'params', 'unique_rank', 'dual', 'stages', 'include', 'exclude',
                    'alone', 'classifier')
    if names_detector(args):
        change_detector(args, 'converted', share, {**options, **({'bn': True} if args.bn else {})})
        return
    if args.bn and (args.calibrate == 0 or not (args.data or args.data_dir)):
        raise LeanError('--bn needs training images for the statistics: --data-dir DIR or --data digits, without '
                        '--calibrate 0.')

    def convert(model: Any, x: Any, images: Any) -> Any:
        return share(model, example_input=x, bn=args.bn, calibration=images, **options)

    change_network(args, 'converted', convert)
