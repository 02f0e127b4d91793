"""Train a small detector, make it smaller in one way and measure what it keeps: question 8 of docs/results.md.

    python tools/experiments_detection.py --data-root BCCD --output DIR    # train
    python tools/experiments_detection.py --model DIR/last.safetensors --technique share --size 0.5 --calibrate 64 \\
        --data-root BCCD --output DIR2
    python tools/experiments_detection.py --model DIR2/last.safetensors --finetune-epochs 2 \\
        --data-root BCCD --output DIR3

Techniques, on the whole detector, and what --size means for them:
  share      share of the parameters that is left
  kernels    share of each layer's kernels that is pruned, by spectral norm
  channels   share of every layer's channels that is removed, by spectral norm
--calibrate N repairs the result with N training images without their boxes. Writes DIR/last.safetensors and
DIR/result.json: COCO AP on the test images, parameters, multiply-accumulates, bytes.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

import timm_lean
import timm_lean.mmdet
from timm_lean import LeanError
from timm_lean.checkpoint.files import atomic_file, writable_dir
from timm_lean.measure import count_params
from timm_lean.mmdet import lean_detector, open_detector
from timm_lean.mmdet.detector import write_detector
from timm_lean.mmdet.launch import train_detector
from timm_lean.mmdet.report import detector_macs
from timm_lean.mmdet.runs import calibration_images, detector_scores, finetune_detector, set_data

CONFIG = 'timm_lean::bccd/rtmdet_tiny_bccd.py'
EPOCHS = 12  # of that config
TECHNIQUES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    'share': (timm_lean.share, 'params', {}),
    'kernels': (timm_lean.prune_kernels, 'amount', {'scope': 'layer'}),
    'channels': (timm_lean.prune_channels, 'pruning_ratio', {}),
}


def run(args: argparse.Namespace) -> None:
    folder = writable_dir(args.output)
    torch.manual_seed(args.seed)
    epochs = args.finetune_epochs
    if args.model is None:
        train_detector(CONFIG, work_dir=str(folder), data_root=args.data_root, resume='auto', cfg_options={
            'train_cfg.val_interval': EPOCHS, 'randomness.seed': args.seed})
        args.model, epochs = str(folder / 'last.safetensors'), EPOCHS
        detector: Any = open_detector(args.model)
    else:
        detector = open_detector(args.model)
        set_data(detector, args.data_root)
        if args.technique:
            verb, option, options = TECHNIQUES[args.technique]
            images = calibration_images(detector, args.calibrate) if args.calibrate else None
            detector = lean_detector(detector, verb, calibration=images, **{option: args.size}, **options)
            print(detector.lean_report)
        if epochs:
            detector = finetune_detector(detector, epochs)
        write_detector(detector, folder / 'last.safetensors')
    scores = detector_scores(detector)
    result = {
        'ap': scores['coco/bbox_mAP'], 'ap50': scores['coco/bbox_mAP_50'], 'params': count_params(detector),
        'macs': detector_macs(detector), 'bytes': (folder / 'last.safetensors').stat().st_size,
        **({'epochs': epochs} if epochs else {})}
    with atomic_file(folder / 'result.json') as temporary:
        temporary.write_text(json.dumps(result) + '\n')
    print(json.dumps(result))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog='experiments_detection', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', metavar='FILE', help='the detector to change; trains one if left out')
    p.add_argument('--technique', choices=TECHNIQUES)
    p.add_argument('--size', type=float, default=0.5)
    p.add_argument('--calibrate', type=int, default=0, metavar='N', help='training images, no boxes (default: none)')
    p.add_argument('--finetune-epochs', type=int, default=0, metavar='N')
    p.add_argument('--data-root', required=True, metavar='DIR', help='folder in COCO format')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--output', required=True, type=Path, metavar='DIR')
    return p


def main() -> int:
    try:
        run(parser().parse_args())
    except LeanError as e:
        print(f'experiments_detection: {e}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
