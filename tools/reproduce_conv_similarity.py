"""Does Convolutional Similarity help? A small experiment on CIFAR-10, reported as it comes out.

    python tools/reproduce.py conv-similarity --data-dir CIFAR10 --per-class 500 --epochs 15 --seeds 0 1 2

Four ways of training one network, equal in everything else (initial weights before any `init`, order of the images,
augmentation, learning rate): `baseline`, `reg` (conv_similarity as regularizer), `init` (as data-free initialization)
and `kernel_ortho`. CIFAR10 is a folder with `train/<class>/*` and `test/<class>/*` images.
"""
import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import timm_lean  # noqa: F401  (registers the models)
from timm_lean import LeanError
from timm_lean.measure.similarity import feature_similarity
from timm_lean.regularizers import create_regularizer, initialize_conv_similarity, loss_terms, set_progress

METHODS = ('baseline', 'reg', 'init', 'kernel_ortho')
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def load_split(folder: Path, per_class: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of every class by name: normalized `[N, 3, H, W]` and labels `[N]`."""
    classes = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not classes:
        raise LeanError(f'{str(folder)!r} has no class folders; --data-dir needs train/<class>/* and test/<class>/*.')
    images, labels = [], []
    for label, path in enumerate(classes):
        files = sorted(path.iterdir())
        for file in files[:per_class or len(files)]:
            with Image.open(file) as image:
                images.append(np.asarray(image.convert('RGB')))
            labels.append(label)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (pixels - mean) / std, torch.tensor(labels)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random flip and shift by up to 4 pixels, one of each per image, for `[B, C, H, W]` on the CPU."""
    batch, _, height, width = images.shape
    flip = torch.rand(batch, generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (4, 4, 4, 4))
    dy, dx = torch.randint(0, 9, (2, batch), generator=generator).tolist()
    return torch.stack([padded[i, :, y:y + height, x:x + width] for i, (y, x) in enumerate(zip(dy, dx, strict=True))])


def train_one(method: str, seed: int, data: dict[str, tuple[torch.Tensor, torch.Tensor]], args: argparse.Namespace,
              ) -> dict[str, Any]:
    """Train one network; its accuracy by epoch and its feature similarity before and after."""
    device = torch.device(args.device)
    torch.manual_seed(seed)
    model = timm.create_model(args.model, num_classes=int(data['train'][1].max()) + 1).to(device)
    trace = initialize_conv_similarity(model, args.init_steps) if method == 'init' else []
    regularizers = []
    if method == 'reg':
        regularizers = [
            create_regularizer('conv_similarity', weight=args.beta, normalize=False, schedule=args.schedule)]
    elif method == 'kernel_ortho':
        regularizers = [create_regularizer('kernel_ortho', weight=args.ortho, schedule=args.schedule)]
    probe = [data['test'][0][:256]]
    similarity_before = feature_similarity(model, probe)

    images, labels = data['train']
    steps = max(len(images) // args.batch_size, 1)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * steps)
    generator = torch.Generator().manual_seed(seed)
    accuracy = []
    start = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for i in range(steps):
            set_progress(regularizers, (epoch * steps + i) / (args.epochs * steps))
            index = order[i * args.batch_size:(i + 1) * args.batch_size]
            output = model(augment(images[index], generator).to(device))
            loss = F.cross_entropy(output, labels[index].to(device))
            terms = loss_terms(regularizers, model)
            loss = loss + sum(v for k, v in terms.items() if k.startswith('loss_'))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        accuracy.append(evaluate(model, *data['test'], device))
    similarity_after = feature_similarity(model, probe)
    reached = [e + 1 for e, a in enumerate(accuracy) if a >= args.target]
    return {
        'method': method, 'seed': seed, 'accuracy': accuracy[-1], 'curve': accuracy,
        'epochs_to_target': reached[0] if reached else None,
        'similarity_before': statistics.mean(similarity_before.values()),
        'similarity_after': statistics.mean(similarity_after.values()),
        'init_trace': [trace[0], trace[-1]] if trace else None,
        'seconds_per_epoch': (time.perf_counter() - start) / args.epochs,
    }


@torch.no_grad()
def evaluate(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, device: torch.device) -> float:
    """Top-1 accuracy in per cent."""
    model.eval()
    right = sum(int((model(x.to(device)).argmax(1).cpu() == y).sum())
                for x, y in zip(images.split(500), labels.split(500), strict=True))
    return 100 * right / len(labels)


def run(args: argparse.Namespace) -> str:
    """Train every method with every seed; a Markdown table."""
    torch.set_num_threads(args.threads)
    folder = Path(args.data_dir)
    data = {
        'train': load_split(folder / 'train', args.per_class),
        'test': load_split(folder / 'test', args.test_per_class),
    }
    rows = []
    for seed in args.seeds:
        for method in args.methods:
            rows.append(train_one(method, seed, data, args))
            print(f'seed {seed} {method}: {rows[-1]["accuracy"]:.2f} %', flush=True)
            if args.output:
                Path(args.output).write_text(json.dumps({'args': vars(args), 'rows': rows}, indent=1) + '\n')
    return format_rows(rows, args.target)


def format_rows(rows: Sequence[dict[str, Any]], target: float) -> str:
    """Mean and standard deviation over seeds, a line per method, as a Markdown table."""
    head = ['method', 'accuracy %', f'epochs to {target:g} %', 'similarity before', 'similarity after',
            's / epoch', 'seeds']
    lines = ['| ' + ' | '.join(head) + ' |', '|' + ' --- |' * len(head)]
    for method in dict.fromkeys(row['method'] for row in rows):
        mine = [row for row in rows if row['method'] == method]
        epochs = [row['epochs_to_target'] for row in mine]
        cells = [method, _spread([row['accuracy'] for row in mine], 2),
                 ', '.join('never' if e is None else str(e) for e in epochs),
                 _spread([row['similarity_before'] for row in mine], 3),
                 _spread([row['similarity_after'] for row in mine], 3),
                 f'{statistics.mean(row["seconds_per_epoch"] for row in mine):.1f}', str(len(mine))]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def _spread(values: list[float], digits: int) -> str:
    text = f'{statistics.mean(values):.{digits}f}'
    return text + f' ± {statistics.stdev(values):.{digits}f}' if len(values) > 1 else text


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data-dir', required=True, help='folder with train/<class>/* and test/<class>/*')
    p.add_argument('--model', default='resnet20_cifar')
    p.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS))
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--per-class', type=int, default=500, help='training images per class; 0: all')
    p.add_argument('--test-per-class', type=int, default=200, help='test images per class; 0: all')
    p.add_argument('--epochs', type=int, default=15)
    p.add_argument('--batch-size', type=int, default=128)
    p.add_argument('--lr', type=float, default=0.1)
    p.add_argument('--beta', type=float, default=1e-4, help='weight of conv_similarity (raw sum, all pairs)')
    p.add_argument('--ortho', type=float, default=1e-4, help='weight of kernel_ortho')
    p.add_argument('--schedule', default='constant', help='of both regularizers')
    p.add_argument('--init-steps', type=int, default=50)
    p.add_argument('--target', type=float, default=50.0, help='accuracy in per cent')
    p.add_argument('--device', default='cpu')
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    p.add_argument('--output', help='write all runs to this JSON file')
    return p
