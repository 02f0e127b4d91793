"""`timm-lean prune`: take kernels, channels or blocks out of a network or detector, and say what it cost and saved."""
import argparse
from collections.abc import Callable
from typing import Any

from .arguments import add_calibration, add_detector, add_finetuning, add_json, add_layers, add_model, add_trust, given
from .changing import change_network
from .changing_detector import change_detector, names_detector

HELP = 'prune the kernels, channels or blocks of a network'

_KERNEL = ('threshold', 'amount', 'contrib', 'scope', 'min_keep')
_CHANNEL = ('ratio', 'global_pruning', 'round_to')
_BLOCK = ('ratio', 'count', 'blocks')


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_model(p, 'timm name, checkpoint file, local-dir:DIR, or a detector')
    p.add_argument('-o', '--output', required=True, metavar='FILE', help='the pruned checkpoint')
    p.add_argument('--criterion',
                   help="spectral_norm if not given; 'output' goes by images; any other prints the list")
    p.add_argument('--granularity', choices=['kernel', 'channel', 'block'], default='kernel')
    p.add_argument('--again', action='store_true', help='prune a model that has been pruned before')
    add_layers(p)
    add_trust(p)
    add_json(p)
    kernels = p.add_argument_group('kernels (exactly one of threshold, amount and contrib)')
    kernels.add_argument('--threshold', type=float, metavar='T', help="below the criterion's threshold, e.g. 1e-4")
    kernels.add_argument('--amount', type=float, metavar='SHARE', help='the lowest share, e.g. 0.8')
    kernels.add_argument('--contrib', type=float, metavar='SHARE', help="below this share of the filter's total score")
    kernels.add_argument('--scope', choices=['global', 'layer', 'filter'], help='what --amount is a share of')
    kernels.add_argument('--min-keep', type=float, metavar='SHARE', help='each layer keeps at least (default 0.01)')
    kernels.add_argument('--compact', action='store_true', help='remove filters and channels that are all dead')
    kernels.add_argument('--plot', metavar='FILE', help='picture of the pruned share per layer')
    channels = p.add_argument_group('channels (--granularity channel)')
    channels.add_argument('--ratio', type=float, metavar='SHARE', help='to remove (default 0.5); of the blocks too')
    channels.add_argument('--global', action='store_const', const=True, dest='global_pruning',
                          help='rank all layers together')
    channels.add_argument('--round-to', type=int, metavar='N', help='keep multiples of N channels (default 8)')
    blocks = p.add_argument_group('residual blocks (--granularity block; exactly one of count, blocks and ratio)')
    blocks.add_argument('--count', type=int, metavar='N', help='the N blocks whose removal changes the output least')
    blocks.add_argument('--blocks', nargs='+', metavar='NAME', help='these, e.g. layer3.1')
    add_calibration(p)
    add_finetuning(p)
    add_detector(p)


def run(args: argparse.Namespace) -> None:
    from timm_lean.checkpoint.recipe import has_step
    from timm_lean.errors import LeanError
    from timm_lean.measure.pictures import check_picture
    from timm_lean.pruning.spectral import check_criterion
    _check_granularity(args)
    if args.criterion not in (None, 'output'):
        check_criterion(args.criterion)
    if args.plot:
        check_picture(args.plot)

    def check(model: Any) -> None:
        backbone = getattr(model, 'backbone', model)
        pruned = has_step(model, 'resize') or has_step(backbone, 'resize')
        if args.granularity == 'channel' and pruned and not args.again:
            raise LeanError(
                f'{args.model} has been pruned by channels before. If pruning it again is meant, say --again.')

    if names_detector(args):
        _prune_detector(args, check)
        return
    change_network(args, 'pruned', lambda model, x, images: _pruned(args, model, x, images), check)


def _pruned(args: argparse.Namespace, model: Any, x: Any, images: Any) -> Any:
    from timm_lean.measure.pictures import save_figure
    from timm_lean.pruning import compact, prune_channels, prune_kernels, remove_blocks
    if args.granularity == 'channel':
        return prune_channels(model, x, calibration=images, **_channel_options(args))
    if args.granularity == 'block':
        return remove_blocks(model, calibration=images, **given(args, 'include', 'exclude', *_BLOCK))
    new: Any = prune_kernels(
        model, again=args.again, calibration=images, **given(args, 'criterion', 'include', 'exclude', 'seed', *_KERNEL))
    if args.plot:
        save_figure(new.lean_report.figure(), args.plot)
    if args.compact:
        if not args.json:
            print(new.lean_report)
        new = compact(new, x)
    return new


def _prune_detector(args: argparse.Namespace, check: Callable[[Any], None]) -> None:
    from timm_lean.errors import LeanError
    from timm_lean.measure.pictures import save_figure
    from timm_lean.pruning import prune_channels, prune_kernels, remove_blocks
    if args.compact:
        raise LeanError('--compact is for classification networks. Take whole channels out by --granularity channel.')
    verb: Callable[..., Any]
    if args.granularity == 'channel':
        verb, options = prune_channels, _channel_options(args)
    elif args.granularity == 'block':
        verb, options = remove_blocks, given(args, 'include', 'exclude', *_BLOCK)
    else:
        verb, options = prune_kernels, given(args, 'criterion', 'include', 'exclude', 'seed', *_KERNEL)
        options['again'] = args.again
    new = change_detector(args, 'pruned', verb, options, check)
    if args.plot:
        save_figure(new.lean_report.figure(), args.plot)


def _channel_options(args: argparse.Namespace) -> dict[str, Any]:
    return given(args, 'criterion', 'global_pruning', 'round_to', 'include', 'exclude', pruning_ratio='ratio')


def _check_granularity(args: argparse.Namespace) -> None:
    from timm_lean.errors import LeanError
    flags = {'kernel': (*_KERNEL, 'compact', 'plot'), 'channel': _CHANNEL, 'block': _BLOCK}
    own = flags[args.granularity] if args.granularity == 'block' else ('criterion', *flags[args.granularity])
    for other, names in flags.items():
        wrong = [f'--{name.removesuffix("_pruning").replace("_", "-")}' for name in ('criterion', *names)
                 if name not in own and getattr(args, name) not in (None, False)]
        if wrong:
            raise LeanError(f'{", ".join(wrong)} belongs to --granularity {other}, not {args.granularity}.')
