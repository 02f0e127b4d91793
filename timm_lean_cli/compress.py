"""`timm-lean compress`: say how small or fast, and get the most accurate network that is."""
import argparse
import sys
from pathlib import Path
from typing import Any

from .arguments import add_calibration, add_detector, add_finetuning, add_json, add_model, add_trust, given
from .changing_detector import names_detector
from .compress_cases import Case, detector_case, network_case
from .opening import finish, progress

HELP = 'search for the most accurate network of a given size, file or latency'

NOT_MET = 3


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_model(p, 'timm name, checkpoint file, local-dir:DIR, or a detector')
    p.add_argument('-o', '--output', required=True, metavar='FILE',
                   help='the checkpoint; X.safetensors also gets a folder X.search with frontier.png and .csv')
    p.add_argument('--target', action='append', required=True, metavar='QUANTITY=VALUE',
                   help='params, macs, file or latency: a share of the original (params=0.5), or a number with a unit '
                        '(file=500kB, latency=5ms); repeatable, all are met')
    p.add_argument('--max-drop', type=float, metavar='POINTS', help='of accuracy, or of AP, that may be lost')
    p.add_argument('--nearest', action='store_true',
                   help='where that is not possible, write the network within --max-drop that comes nearest')
    p.add_argument('--techniques', nargs='+', metavar='NAME',
                   help='to use: blocks, channels, share, kernels, int8 (default: all)')
    p.add_argument('--minutes', type=float, metavar='N', help='time for the search (default 20)')
    p.add_argument('--judge', type=int, metavar='N',
                   help='judge networks by so many evaluation images (default 2,000; of a detector 200)')
    p.add_argument('--resume', action='store_true', dest='go_on', help='go on with a search that was stopped')
    p.add_argument('--dry-run', action='store_true', help='print what could be reached; nothing is written')
    add_json(p)
    add_trust(p)
    add_calibration(p, positions=False, default='512, of a detector 64')
    add_finetuning(p)
    add_detector(p, part=False)


def run(args: argparse.Namespace) -> int:
    from timm_lean.checkpoint.files import output_file
    from timm_lean.errors import LeanError
    from timm_lean.search import TargetError, compress
    from timm_lean.search.target import parse_targets
    parse_targets(args.target)
    output = Path(args.output) if args.dry_run else output_file(args.output, '.safetensors')
    if args.calibrate is not None and args.calibrate < 4:
        raise LeanError(f'--calibrate must be at least 4 images, got {args.calibrate}: compress always calibrates.')
    if args.judge is not None and args.judge < 1:
        raise LeanError(f'--judge must be at least 1 image, got {args.judge}.')
    with progress(args):
        is_detector = names_detector(args, ('data_root', 'evaluate'))
        case = detector_case(args) if is_detector else network_case(args, output.parent)
    if args.dry_run:
        return _dry_run(args, case)
    folder = output.with_suffix('.search')
    with progress(args):
        try:
            new: Any = compress(
                case.model, args.target, case.images, evaluate=case.judge(), finetune=case.finetune,
                nearest=args.nearest, folder=folder, resume=args.go_on, progress=True,
                **given(args, 'max_drop', 'minutes', 'techniques'))
        except KeyboardInterrupt:
            print(f'What was found is in {folder}; --resume goes on from there.', file=sys.stderr)
            raise
        except TargetError as e:
            print(f'timm-lean compress: {e}', file=sys.stderr)
            if e.nearest:
                print('Write it by --nearest.', file=sys.stderr)
            return NOT_MET
        report = new.lean_report
        case.save(new, output, report.weights)
        report.write_csv(folder / 'frontier.csv')
        report.plot(folder / 'frontier.png')
        before, after = case.scores(case.model), case.scores(new)
    scores = {name: {'before': before[name], 'after': after[name]} for name in before}
    lines = [str(report)]
    lines += [f'on all evaluation images{f", {name}" * is_detector}: {_shown(before[name], case.unit)} -> '
              f'{_shown(after[name], case.unit)}' for name in before]
    lines.append(f'{output}, {folder / "frontier.png"}, frontier.csv')
    finish(args, {'output': str(output), 'report': report.to_dict(), **scores}, '\n'.join(lines))
    return 0 if report.met else NOT_MET


def _shown(value: float, unit: str) -> str:
    return f'{value:.2f} {unit}' if unit else f'{value:.3f}'


def _dry_run(args: argparse.Namespace, case: Case) -> int:
    from timm_lean.search import reachable
    table, refused = reachable(case.model, args.target, case.images, **given(args, 'techniques'))
    lines = ['Smallest shares of the original, without regard to accuracy:']
    lines += [f'  {name}: ' + ', '.join(f'{quantity} {share:.3f}' for quantity, share in shares.items())
              for name, shares in table.items()]
    lines += [f'  {name} is left out: {why}' for name, why in refused.items()]
    finish(args, {'reachable': table, 'refused': refused}, '\n'.join(lines))
    return 0
