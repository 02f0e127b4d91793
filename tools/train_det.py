"""Train a detector: `python tools/train_det.py CONFIG [--data-root DIR] [--classes] [--resume] [--cfg-options K=V]`."""
import sys

import timm_lean.mmdet  # noqa: F401  (also in worker processes started by spawn, which import this file)
from timm_lean_cli.detectors import train_main

if __name__ == '__main__':
    sys.exit(train_main())
