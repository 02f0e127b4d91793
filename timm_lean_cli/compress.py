"""`timm-lean compress`: say how small or fast, and get the most accurate network that is."""
import argparse
import sys
from pathlib import Path
from typing import Any

from .arguments import add_calibration, add_finetuning, add_json, add_model, given
from .changing import finetuned, finetuning_options
from .opening import data_options, finish, open_model, progress

HELP = 'search for the most accurate network of a given size, file or latency'

NOT_MET = 3
_JUDGING_IMAGES = 2000


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_model(p)
    p.add_argument('-o', '--output', required=True, metavar='FILE',
                   help='the checkpoint; X.safetensors also gets a folder X.search with frontier.png and .csv')
    p.add_argument('--target', action='append', required=True, metavar='QUANTITY=VALUE',
                   help='params, macs, file or latency: a share of the original (params=0.5), or a number with a unit '
                        '(file=500kB, latency=5ms); repeatable, all are met')
    p.add_argument('--max-drop', type=float, metavar='POINTS', help='of accuracy that may be lost')
    p.add_argument('--nearest', action='store_true',
                   help='where that is not possible, write the network within --max-drop that comes nearest')
    p.add_argument('--techniques', nargs='+', metavar='NAME',
                   help='to use: blocks, channels, share, kernels, int8 (default: all)')
    p.add_argument('--minutes', type=float, metavar='N', help='time for the search (default 20)')
    p.add_argument('--judge', type=int, metavar='N',
                   help=f'judge networks by so many evaluation images (default {_JUDGING_IMAGES:,})')
    p.add_argument('--resume', action='store_true', dest='go_on', help='go on with a search that was stopped')
    p.add_argument('--dry-run', action='store_true', help='print what could be reached; nothing is written')
    add_json(p)
    add_calibration(p)
    add_finetuning(p)


def run(args: argparse.Namespace) -> int:
    from timm_lean.checkpoint.files import output_file
    from timm_lean.checkpoint.format import save_model
    from timm_lean.errors import LeanError
    from timm_lean.search import TargetError, compress
    from timm_lean.search.target import parse_targets
    from timm_lean.training.evaluate import evaluate_source
    parse_targets(args.target)
    options = data_options(args)
    output = Path(args.output) if args.dry_run else output_file(args.output, '.safetensors')
    if not (args.data or args.data_dir):
        raise LeanError('compress needs images: --data-dir DIR, or --data digits.')
    if args.calibrate is not None and args.calibrate < 4:
        raise LeanError(f'--calibrate must be at least 4 images, got {args.calibrate}: compress always calibrates.')
    if args.judge is not None and args.judge < 1:
        raise LeanError(f'--judge must be at least 1 image, got {args.judge}.')
    tuning = finetuning_options(args)
    model = open_model(args).to(options['device'])
    images = [x for x, _ in _loader(model, options, 'train', args.calibrate or 512)]
    if args.dry_run:
        return _dry_run(args, model, images)
    folder = output.with_suffix('.search')
    search = given(args, 'max_drop', 'minutes', 'techniques')
    with progress(args):
        try:
            new: Any = compress(
                model, args.target, images, evaluate=_accuracy(model, options, args.judge or _JUDGING_IMAGES),
                finetune=finetuned(args, model, tuning, output.parent) if tuning else None, nearest=args.nearest,
                folder=folder, resume=args.go_on, progress=True, **search)
        except KeyboardInterrupt:
            print(f'What was found is in {folder}; --resume goes on from there.', file=sys.stderr)
            raise
        except TargetError as e:
            print(f'timm-lean compress: {e}', file=sys.stderr)
            if e.nearest:
                print('Write it by --nearest.', file=sys.stderr)
            return NOT_MET
        report = new.lean_report
        save_model(new, output, weights=report.weights)
        report.write_csv(folder / 'frontier.csv')
        report.plot(folder / 'frontier.png')
        top1 = {name: evaluate_source(args.model, network, **options)['top1']
                for name, network in (('before', model), ('after', new))}
    result = {'output': str(output), 'report': report.to_dict(), 'top1': top1}
    finish(args, result, f'{report}\non all evaluation images: {top1["before"]:.2f} -> {top1["after"]:.2f} %\n'
                         f'{output}, {folder / "frontier.png"}, frontier.csv')
    return 0 if report.met else NOT_MET


def _dry_run(args: argparse.Namespace, model: Any, images: Any) -> int:
    from timm_lean.search import reachable
    table, refused = reachable(model, args.target, images, **given(args, 'techniques'))
    lines = ['Smallest shares of the original, without regard to accuracy:']
    lines += [f'  {name}: ' + ', '.join(f'{quantity} {share:.3f}' for quantity, share in shares.items())
              for name, shares in table.items()]
    lines += [f'  {name} is left out: {why}' for name, why in refused.items()]
    finish(args, {'reachable': table, 'refused': refused}, '\n'.join(lines))
    return 0


def _loader(model: Any, options: dict[str, Any], split: str, limit: int | None) -> Any:
    from timm_lean.training.data import open_eval_loader
    return open_eval_loader(model, **options, split=split, limit=limit)


def _accuracy(model: Any, options: dict[str, Any], limit: int) -> Any:
    """A function that gives a network's top-1 accuracy in per cent; images are decoded once."""
    from timm_lean.training.evaluate import evaluate
    batches = list(_loader(model, options, 'eval', limit))
    return lambda network: evaluate(network, batches, options['device'])['top1']
