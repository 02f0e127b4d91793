"""Evaluate a detector: `python tools/test_det.py [CONFIG] FILE [--out FILE.pkl] [--show-dir DIR] [--tta]`."""
import sys

import timm_lean.mmdet  # noqa: F401  (also in worker processes started by spawn, which import this file)
from timm_lean_cli.detectors import test_main

if __name__ == '__main__':
    sys.exit(test_main())
