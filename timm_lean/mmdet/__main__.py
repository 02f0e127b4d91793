"""`python -m timm_lean.mmdet SCRIPT ARGS`: run a script with the plugin imported first.

For scripts that import `mmcv.ops` before they read a config, MMDetection's `tools/test.py` among them.
"""
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import timm_lean.mmdet  # noqa: F401


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script as `python SCRIPT ARGS` would; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ('-h', '--help'):
        print('usage: python -m timm_lean.mmdet SCRIPT [ARGS ...]', file=sys.stderr)
        return 0 if argv else 2
    if not Path(argv[0]).is_file():
        print(f'python -m timm_lean.mmdet: the script {argv[0]} does not exist.', file=sys.stderr)
        return 2
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    runpy.run_path(argv[0], run_name='__main__')
    return 0


if __name__ == '__main__':
    sys.exit(main())
