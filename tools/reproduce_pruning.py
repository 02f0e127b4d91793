"""One-shot kernel pruning by eight criteria under the paper's protocol, on CIFAR-10.

    python tools/reproduce_pruning.py --data-dir CIFAR10 --model resnet32_cifar --epochs 200 --device cuda
    python tools/reproduce_pruning.py --data-dir CIFAR10 --per-class 100 --test-per-class 100 --epochs 2    # smoke run

Paper: https://arxiv.org/abs/2102.02804. Train with an L1 penalty of 1e-4 on the convolution weights, then prune each
criterion's kernels below its threshold (t = 1e-4), once, without fine-tuning; report the pruned share of the
convolution kernels and the accuracy before and after. CIFAR10 is a folder with `train/<class>/*` and `test/<class>/*`.
"""
import argparse
import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import timm_lean
from timm_lean import LeanError
from timm_lean.pruning import CRITERIA, KernelPruner
from timm_lean.regularizers import create_regularizer

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# Pruned kernels in per cent, from the paper.
PAPER = {
    'resnet32_cifar': {'spectral_norm': 68, 'spectral_radius': 69, 'weight': 69, 'min_eig': 75},
    'resnet56_cifar': {'spectral_norm': 82, 'spectral_radius': 82, 'weight': 82, 'min_eig': 86},
}


def load_split(folder: Path, per_class: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of every class by name: uint8 `[N, 3, H, W]` and labels `[N]`."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not classes:
        raise LeanError(f'{str(folder)!r} has no class folders; --data-dir needs train/<class>/* and test/<class>/*.')
    images, labels = [], []
    for label, path in enumerate(classes):
        for file in sorted(path.iterdir())[:per_class or None]:
            with Image.open(file) as image:
                images.append(np.asarray(image.convert('RGB')))
            labels.append(label)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device), torch.tensor(labels, device=device)


def normalize(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augment(images: torch.Tensor) -> torch.Tensor:
    """Random crops after 4 pixels of zero padding, and flips, for `[B, 3, H, W]`."""
    batch, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    rows = torch.arange(height, device=images.device) + torch.randint(0, 9, (batch, 1), device=images.device)
    cols = torch.arange(width, device=images.device) + torch.randint(0, 9, (batch, 1), device=images.device)
    which = torch.arange(batch, device=images.device)[:, None, None]
    crops = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
    flip = torch.rand(batch, device=images.device) < 0.5
    return torch.where(flip[:, None, None, None], crops.flip(3), crops)


@torch.no_grad()
def evaluate(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 accuracy in per cent."""
    model.eval()
    parts = zip(images.split(500), labels.split(500), strict=True)
    return 100 * sum(int((model(normalize(x)).argmax(1) == y).sum()) for x, y in parts) / len(labels)


def train(args: argparse.Namespace, data: dict[str, Any], device: torch.device) -> torch.nn.Module:
    """SGD with momentum 0.9, weight decay 1e-4, lr divided by ten after half and three quarters of the epochs."""
    torch.manual_seed(args.seed)
    model = timm.create_model(args.model, num_classes=int(data['train'][1].max()) + 1).to(device)
    l1 = create_regularizer('l1', weight=args.l1)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    milestones = [max(args.epochs // 2, 1), max(args.epochs * 3 // 4, 2)]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    images, labels = data['train']
    for epoch in range(args.epochs):
        model.train()
        start = time.perf_counter()
        for index in torch.randperm(len(images)).to(device).split(args.batch_size):
            loss = F.cross_entropy(model(normalize(augment(images[index]))), labels[index]) + l1(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scheduler.step()
        if not torch.isfinite(loss):
            raise LeanError(f'The loss is {loss.item()} in epoch {epoch + 1}. Lower --lr.')
        print(f'epoch {epoch + 1}/{args.epochs}: loss {loss.item():.3f}, {time.perf_counter() - start:.1f} s',
              flush=True)
    return model


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Train (or load `--checkpoint`), then prune by every criterion; one dict per criterion."""
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    data = {'test': load_split(Path(args.data_dir) / 'test', args.test_per_class, device)}
    if args.checkpoint:
        model = timm_lean.load_model(args.checkpoint).to(device)
    else:
        data['train'] = load_split(Path(args.data_dir) / 'train', args.per_class, device)
        model = train(args, data, device)
        if args.save:
            timm_lean.save_model(model, args.save)
    before = evaluate(model, *data['test'])
    rows = []
    for criterion in CRITERIA:
        pruned = copy.deepcopy(model)
        report = KernelPruner(pruned, criterion, threshold=args.threshold, min_keep=0).prune()
        rows.append({
            'model': args.model, 'criterion': criterion, 'pruned': 100 * report.share, 'before': before,
            'after': evaluate(pruned, *data['test']), 'paper': PAPER.get(args.model, {}).get(criterion)})
    return rows


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, one line per criterion."""
    lines = ['| criterion | pruned kernels % | paper % | top-1 before % | top-1 after % |', '|' + ' --- |' * 5]
    for row in rows:
        paper = '' if row['paper'] is None else f'{row["paper"]}'
        lines.append(f'| {row["criterion"]} | {row["pruned"]:.1f} | {paper} | {row["before"]:.2f} | '
                     f'{row["after"]:.2f} |')
    return '\n'.join(lines)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data-dir', required=True, help='folder with train/<class>/* and test/<class>/*')
    p.add_argument('--model', default='resnet32_cifar')
    p.add_argument('--checkpoint', help='prune this trained checkpoint instead of training')
    p.add_argument('--save', metavar='FILE', help='write the trained network before pruning')
    p.add_argument('--epochs', type=int, default=200)
    p.add_argument('--batch-size', type=int, default=128)
    p.add_argument('--lr', type=float, default=0.1)
    p.add_argument('--weight-decay', type=float, default=1e-4)
    p.add_argument('--l1', type=float, default=1e-4)
    p.add_argument('--threshold', type=float, default=1e-4)
    p.add_argument('--per-class', type=int, default=0, help='training images per class; 0: all')
    p.add_argument('--test-per-class', type=int, default=0, help='test images per class; 0: all')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--device', default='cpu')
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    p.add_argument('--output', metavar='FILE', help='also write the rows as JSON')
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        rows = run(args)
    except LeanError as e:
        print(f'error: {e}')
        return 2
    print(format_rows(rows))
    if args.output:
        Path(args.output).write_text(json.dumps({'args': vars(args), 'rows': rows}, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
