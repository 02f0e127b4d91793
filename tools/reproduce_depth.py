"""Check the claim of entropy-based depth: accuracy, time and near-identity blocks against depth at equal budget.

    python tools/reproduce.py depth                                    # the embedded digits, minutes
    python tools/reproduce.py depth --data-dir CIFAR10 --train-images 2000 --epochs 10 --budget 100k       # on a CPU
    python tools/reproduce.py depth --data-dir CIFAR10 --epochs 100 --seeds 5 --device cuda               # in full

Measures the training images' entropy, takes the bound, trains the sweep and prints the tables of docs/depth.md. It is
`timm-lean depth --verify` with these defaults.
"""
import argparse

from timm_lean.depth.bound import DEFAULT_RULE, depth_bound
from timm_lean.depth.entropy import dataset_entropy
from timm_lean.training.depth_sweep import verify_bound
from timm_lean_cli.depth import open_training_images


def run(args: argparse.Namespace) -> str:
    """Measure, take the bound, train the sweep; its tables."""
    args.data = 'folder' if args.data_dir else 'digits'
    data, num_classes = open_training_images(args.data, args.data_dir)
    entropy = dataset_entropy(data, workers=args.workers if args.data_dir else 0, progress=True)
    size = args.img_size or (min(entropy.image_size) if args.data_dir else 16)
    classes = num_classes or 10
    bound = depth_bound(entropy, size, entropy.channels, classes, args.rule)
    print(f'{entropy.bits:.4f} bits ({entropy.nats:.4f} nats) over {entropy.count:,} images; {size} px: '
          f'bound {bound}')
    keys = ('data', 'data_dir', 'epochs', 'batch_size', 'train_images', 'lr', 'device', 'workers', 'hflip')
    return verify_bound(
        bound, img_size=size, num_classes=classes, family=args.family, budget=args.budget, depths=args.depths,
        seeds=args.seeds, output=args.output, **{k: getattr(args, k) for k in keys})['text']


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog='reproduce depth', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data-dir', help='folder with train/ and val/ or test/ (default: the embedded digits)')
    p.add_argument('--family', default='resnet')
    p.add_argument('--rule', default=DEFAULT_RULE)
    p.add_argument('--budget', default='100k', help='cost of every network, e.g. 850k or macs=40M')
    p.add_argument('--img-size', type=int, help='default: the median size of the images, 16 for the digits')
    p.add_argument('--depths', type=int, nargs='+')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--epochs', type=int, default=15)
    p.add_argument('--batch-size', type=int, default=64)
    p.add_argument('--lr', type=float, default=0.05)
    p.add_argument('--hflip', type=float)
    p.add_argument('--train-images', type=int)
    p.add_argument('--workers', type=int, default=2)
    p.add_argument('--device', default='auto')
    p.add_argument('--output', default='output/depth')
    return p
