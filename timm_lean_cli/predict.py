"""`timm-lean predict`: classes of images, or objects in them."""
import argparse
import sys
from typing import Any

from .arguments import add_json, add_model, add_trust, given
from .opening import device_of, finish, is_detector, open_model

HELP = 'classes of images, or objects in them by a detector'


def add_arguments(p: argparse.ArgumentParser) -> None:
    add_model(p, "timm name, checkpoint file, local-dir:DIR, or a detector's file or folder")
    p.add_argument('images', nargs='+', metavar='IMAGE')
    p.add_argument('--top', type=int, metavar='N', help='classes shown (default 5)')
    p.add_argument('-o', '--output', metavar='FILE', help='detector: picture with boxes; a folder for several')
    p.add_argument('--score-thr', type=float, metavar='SCORE', help='detector: least score of a box (default 0.3)')
    add_trust(p)
    p.add_argument('--device', help='auto (default), cpu, cuda, cuda:N, ...')
    add_json(p)


def run(args: argparse.Namespace) -> None:
    from timm_lean.errors import LeanError
    device = device_of(args)
    if args.top is not None and args.top < 1:
        raise LeanError(f'--top must be at least 1, got {args.top}.')
    if is_detector(args.model):
        _detect(args, device)
        return
    if args.output or args.score_thr is not None:
        raise LeanError(f'{args.model} is no detector: -o and --score-thr are for detectors.')
    from timm_lean.training.predict import predict
    results = predict(open_model(args), args.images, device, progress=sys.stderr.isatty(), **given(args, 'top'))
    finish(args, results, '\n'.join(
        f'{r["image"]}: ' + ', '.join(f'{p["class"]} {100 * p["probability"]:.1f} %' for p in r['top'])
        for r in results))


def _detect(args: argparse.Namespace, device: Any) -> None:
    from timm_lean.mmdet import predict_images
    results = predict_images(
        args.model, args.images, device=str(device), **given(args, 'score_thr', 'trust_imports', out='output'))
    lines = []
    for r in results:
        boxes = ', '.join(f'{b["class"]} {100 * b["score"]:.1f} %' for b in r['boxes'])
        lines.append(f'{r["image"]}: {boxes or "nothing"}' + (f' -> {r["picture"]}' if r['picture'] else ''))
    finish(args, results, '\n'.join(lines))
