"""Repeat an experiment of docs/results.md.

    python tools/reproduce.py conv-similarity --help
    python tools/reproduce.py eigen-pruning --help
    python tools/reproduce.py depth --help
    python tools/reproduce.py sharing --help
    python tools/reproduce.py calibration --help
"""
import importlib
import sys
from pathlib import Path

from timm_lean import LeanError

sys.path.insert(0, str(Path(__file__).parent))

# each with `parser()` and `run(args) -> text`
EXPERIMENTS = {
    'conv-similarity': 'reproduce_conv_similarity', 'eigen-pruning': 'reproduce_pruning', 'depth': 'reproduce_depth',
    'sharing': 'reproduce_sharing', 'calibration': 'reproduce_calibration',
    'calibration-families': 'reproduce_calibration_families'}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in EXPERIMENTS:
        print(__doc__.strip(), file=sys.stderr)
        return 0 if sys.argv[1:] in (['-h'], ['--help']) else 2
    name = sys.argv[1]
    experiment = importlib.import_module(EXPERIMENTS[name])
    args = experiment.parser().parse_args(sys.argv[2:])
    try:
        print(experiment.run(args))
    except LeanError as e:
        print(f'reproduce {name}: {e}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
