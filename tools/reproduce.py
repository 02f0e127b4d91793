"""Repeat an experiment of docs/results.md.

    python tools/reproduce.py conv-similarity --help
    python tools/reproduce.py eigen-pruning --help
    python tools/reproduce.py depth --help
    python tools/reproduce.py sharing --help
"""
import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# each with `main(argv) -> exit code`
EXPERIMENTS = {
    'conv-similarity': 'reproduce_conv_similarity', 'eigen-pruning': 'reproduce_pruning', 'depth': 'reproduce_depth',
    'sharing': 'reproduce_sharing'}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in EXPERIMENTS:
        print(__doc__.strip(), file=sys.stderr)
        return 0 if sys.argv[1:] in (['-h'], ['--help']) else 2
    return importlib.import_module(EXPERIMENTS[sys.argv[1]]).main(sys.argv[2:])


if __name__ == '__main__':
    sys.exit(main())
