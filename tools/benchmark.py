"""Measure what this project claims, as ratios against anchors of the same run.

    python tools/benchmark.py all --write docs/benchmarks.md    # one table of everything
    python tools/benchmark.py shared                            # one part, with all its options
    python tools/benchmark.py shared --help

Every figure is the median of interleaved repeats (one of each form in turn, so that a change of the machine's load
falls on all of them alike).
"""
import argparse
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# each a file with `main(argv) -> exit code`
PARTS = {
    'all': 'one table of ratios: shared bases, regularizers, criteria, pruned networks, entropy',
    'shared': 'shared bases against the dense network and the naive form',
    'regularizers': 'regularizers as a share of a training step',
    'detection': "a detector's training iteration, with and without hooks",
    'criteria': 'pruning criteria against torch.linalg and a loop',
    'calibration': 'time and memory of calibration against plain forward passes',
    'compress': "`compress` against Torch-Pruning's and torch's pruning at the same sizes",
    'entropy': 'entropy of images against bare decoding',
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='part', required=True)
    for name, text in PARTS.items():
        commands.add_parser(name, help=text, add_help=False)
    part = parser.parse_args(sys.argv[1:2]).part
    from timm_lean import LeanError
    try:
        return importlib.import_module(f'bench_{part}').main(sys.argv[2:])
    except LeanError as e:
        print(f'benchmark {part}: {e}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
