"""The experiments of docs/results.md: run them unattended, see how far they are, write the page.

    python tools/experiments.py run --data-dir CIFAR10                       # everything that has no row yet
    python tools/experiments.py run --data-dir CIFAR10 --only 'q1/dense/*' 'q1/shared/*'
    python tools/experiments.py status
    python tools/experiments.py report                                       # docs/results.md and its pictures
    python tools/experiments.py run --bccd-dir BCCD --only 'q8/*'            # detectors

CIFAR10 is a folder with train/CLASS/* and test/CLASS/*, or torchvision's (with cifar-10-batches-py). `run` takes one
run after the other, at the lowest priority; stopped or killed, it goes on where it was when started again. Started
twice, it takes two at a time: on a machine with other work two runs of one thread each (OMP_NUM_THREADS=1) get further
than one of two threads, which wait for each other. Rows are appended to docs/results/qN.jsonl. `experiments_queue.py`
says what a queue file holds.
"""
import argparse
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from experiments_queue import ROOT, Queue, choose, image_folder, read_queue
from experiments_report import write_page

from timm_lean import LeanError


def run(args: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the queue's `finally`, which stops the command
    data = image_folder(args.data_dir, args.runs) if args.data_dir else None
    given = {None, *(name for name in ('data', 'bccd') if getattr(args, f'{name}_dir'))}
    runs = choose(read_queue(args.queue), args.only)
    left_out = [each for each in runs if each.needs not in given]
    if len(left_out) == len(runs) or (left_out and args.only):
        raise LeanError(f'{left_out[0].label} needs images: give --{left_out[0].needs}-dir.')
    for needs in sorted({str(each.needs) for each in left_out}):
        print(f'without --{needs}-dir {sum(each.needs == needs for each in left_out)} runs are left out')
    runs = [each for each in runs if each.needs in given]
    queue = Queue(runs, args.runs, args.results, data, args.bccd_dir, args.commit)
    failed = queue.work(args.nice, lambda line: print(line, flush=True))
    return 1 if failed else 0


def status(args: argparse.Namespace) -> int:
    print(Queue(choose(read_queue(args.queue), args.only), args.runs, args.results).status())
    return 0


def report(args: argparse.Namespace) -> int:
    write_page(read_queue(args.queue), args.results, args.output)
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog='experiments', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True, metavar='COMMAND')
    for function in (run, status, report):
        sub = commands.add_parser(function.__name__)
        sub.set_defaults(function=function)
        sub.add_argument('--results', type=Path, default=ROOT / 'docs' / 'results', metavar='DIR', help='the rows')
        sub.add_argument('queue', nargs='?', type=Path, default=ROOT / 'tools' / 'experiments.yaml', metavar='QUEUE')
        if function is report:
            sub.add_argument('--output', type=Path, default=ROOT / 'docs' / 'results.md', metavar='FILE')
            continue
        sub.add_argument('--only', nargs='+', default=[], metavar='PATTERN', help='runs by label, in this order')
        sub.add_argument('--runs', type=Path, default=Path('output/experiments'), metavar='DIR', help='folder of runs')
        if function is run:
            sub.add_argument('--data-dir', type=Path, metavar='DIR', help='the images')
            sub.add_argument('--bccd-dir', type=Path, metavar='DIR', help='BCCD in COCO format, for the detectors')
            sub.add_argument('--nice', type=int, default=19, help='priority of the commands (default 19, the lowest)')
            sub.add_argument('--commit', help='for the rows, on a machine without the repository (default: asks git)')
    return p


def main() -> int:
    args = parser().parse_args()
    for name in ('runs', 'results', 'data_dir', 'bccd_dir'):
        if getattr(args, name, None) is not None:
            setattr(args, name, getattr(args, name).resolve())  # commands run in the repository's root
    try:
        return args.function(args)
    except LeanError as e:
        print(f'experiments: {e}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
