"""`python -m timm_lean.mmdet`: train, test, or a script of MMDetection's, with the plugin imported first.

    python -m timm_lean.mmdet train CONFIG ...     what tools/train_det.py does
    python -m timm_lean.mmdet test FILE ...        what tools/test_det.py does
    python -m timm_lean.mmdet SCRIPT ...           for scripts that import `mmcv.ops` before they read a config
"""
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import timm_lean.mmdet  # noqa: F401  (also in worker processes started by spawn, which import this file)
from timm_lean_cli.detectors import test_main, train_main

_USAGE = 'usage: python -m timm_lean.mmdet {train CONFIG | test FILE | SCRIPT} [ARGS ...]'


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, or a script as `python SCRIPT ARGS` would; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ('-h', '--help'):
        print(_USAGE, file=sys.stderr)
        return 0 if argv else 2
    if argv[0] == 'train':
        return train_main(argv[1:], 'python -m timm_lean.mmdet train')
    if argv[0] == 'test':
        return test_main(argv[1:], 'python -m timm_lean.mmdet test')
    if not Path(argv[0]).is_file():
        print(f'python -m timm_lean.mmdet: the script {argv[0]} does not exist.', file=sys.stderr)
        return 2
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    runpy.run_path(argv[0], run_name='__main__')
    return 0


if __name__ == '__main__':
    sys.exit(main())
