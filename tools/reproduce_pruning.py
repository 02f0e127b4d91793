"""One-shot kernel pruning by eight criteria under the paper's protocol, on CIFAR-10.

    python tools/reproduce.py eigen-pruning --data-dir CIFAR10 --device cuda                      # ResNet-32 in full
    python tools/reproduce.py eigen-pruning --data-dir CIFAR10 --train-images 5000 --epochs 12    # on a CPU

Paper: https://arxiv.org/abs/2102.02804. Train with an L1 penalty of 1e-4 on the convolution weights, then prune each
criterion's kernels below its threshold (t = 1e-4), once, without fine-tuning; report the pruned share of the
convolution kernels and the accuracy before and after. CIFAR10 is a folder with `train/<class>/*` and `test/<class>/*`.
"""
import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm_lean
from timm_lean.pruning import CRITERIA, KernelPruner
from timm_lean.training import TrainConfig, train
from timm_lean.training.data import create_eval_loader, model_data_config, open_dataset
from timm_lean.training.device import resolve_device
from timm_lean.training.evaluate import evaluate

# Pruned kernels in per cent, from the paper.
PAPER = {
    'resnet32_cifar': {'spectral_norm': 68, 'spectral_radius': 69, 'weight': 69, 'min_eig': 75},
    'resnet56_cifar': {'spectral_norm': 82, 'spectral_radius': 82, 'weight': 82, 'min_eig': 86},
}


def run(args: argparse.Namespace) -> str:
    """Train (or load `--checkpoint`), then prune by every criterion; a Markdown table."""
    checkpoint = args.checkpoint
    if not checkpoint:
        result = train(TrainConfig(
            model=args.model, data_dir=args.data_dir, train_images=args.train_images, cache=True, epochs=args.epochs,
            batch_size=args.batch_size, opt='momentum', lr=args.lr, sched='multistep', decay_all=True,
            milestones=[max(args.epochs // 2, 1), max(args.epochs * 3 // 4, 2)], weight_decay=args.weight_decay,
            reg=[f'l1={args.l1}'], seed=args.seed, device=args.device, output=args.run))
        checkpoint = f'{result["output"]}/last.safetensors'
    device = resolve_device(args.device)
    model = timm_lean.load_model(checkpoint).to(device)
    config = model_data_config(model)
    loader = create_eval_loader(
        open_dataset('folder', args.data_dir, 'eval', 3, config['input_size'][-1]), config, 250, device, cache=True)
    before = evaluate(model, loader, device)['top1']
    rows = []
    for criterion in CRITERIA:
        pruned = copy.deepcopy(model)
        report = KernelPruner(pruned, criterion=criterion, threshold=args.threshold, min_keep=0).prune()
        rows.append({
            'model': args.model, 'criterion': criterion, 'pruned': 100 * report.share, 'before': before,
            'after': evaluate(pruned, loader, device)['top1'], 'paper': PAPER.get(args.model, {}).get(criterion)})
    if args.output:
        Path(args.output).write_text(json.dumps({'args': vars(args), 'rows': rows}, indent=1) + '\n')
    return format_rows(rows)


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, one line per criterion."""
    lines = ['| criterion | pruned kernels % | paper % | top-1 before % | top-1 after % |', '|' + ' --- |' * 5]
    for row in rows:
        paper = '' if row['paper'] is None else f'{row["paper"]}'
        lines.append(f'| {row["criterion"]} | {row["pruned"]:.1f} | {paper} | {row["before"]:.2f} | '
                     f'{row["after"]:.2f} |')
    return '\n'.join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog='reproduce eigen-pruning', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data-dir', required=True, help='folder with train/<class>/* and test/<class>/*')
    p.add_argument('--model', default='resnet32_cifar')
    p.add_argument('--checkpoint', help='prune this trained checkpoint instead of training')
    p.add_argument('--run', default='', metavar='DIR', help='folder of the training run (default output/MODEL)')
    p.add_argument('--epochs', type=int, default=200)
    p.add_argument('--batch-size', type=int, default=128)
    p.add_argument('--lr', type=float, default=0.1)
    p.add_argument('--weight-decay', type=float, default=1e-4)
    p.add_argument('--l1', type=float, default=1e-4)
    p.add_argument('--threshold', type=float, default=1e-4)
    p.add_argument('--train-images', type=int, help='training images; all if not given')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', default='auto')
    p.add_argument('--output', metavar='FILE', help='also write the rows as JSON')
    return p
