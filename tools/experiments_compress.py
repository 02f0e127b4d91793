"""Make a trained network smaller in one way and measure what it keeps: question 2 of docs/results.md.

    python tools/experiments_compress.py --model dense.safetensors --technique share --size 0.5 --calibrate 512 \\
        --data-dir CIFAR10 --seed 0 --output DIR

Techniques, and what --size means for them:
  none                the network as it is
  share               share of the parameters that is left
  kernels             share of the kernels that is pruned, by spectral norm
  channels            share of every layer's channels that is removed, by spectral norm
  channels-by-images  the same share, of those channels that the next layers need least for the calibration's images
  channels-together   share of the parameters that is left by removing channels of all layers together, by the images,
                      as `timm-lean compress` does
  blocks              number of residual blocks that are removed, those first that change the output least
  torch-pruning       share of the parameters that is left by removing channels by Torch-Pruning's magnitude importance
  torch-pruning-cut   share of every layer's channels that are removed by it: the same sizes as `channels`
--calibrate N repairs the result with N unlabelled training images, which --seed draws. Writes DIR/last.safetensors,
from which `timm-lean train --model` goes on, and DIR/result.json. MACs are those of the cheaper form of each shared
layer.
"""
import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch_pruning as tp

sys.path.insert(0, str(Path(__file__).parent))
from reproduce_sharing import cheapest_macs

from timm_lean import LeanError, load_model, prune_channels, prune_kernels, save_model, share
from timm_lean.calibration import output_scores
from timm_lean.checkpoint.files import atomic_file, writable_dir
from timm_lean.measure.report import count_params
from timm_lean.pruning import rank_blocks, remove_blocks
from timm_lean.training.data import create_eval_loader, model_data_config, open_dataset
from timm_lean.training.device import resolve_device
from timm_lean.training.evaluate import evaluate

_EXAMPLES = 128
ROUND_TO = 4  # channels; the networks for small images have no more than 16 in their first stage


def compress(model: nn.Module, technique: str, size: float, batches: Any, x: torch.Tensor) -> nn.Module:
    """A smaller copy of the network; `batches` are images to calibrate with, or None, `x` a few to look at it with."""
    repair: dict[str, Any] = {} if batches is None else {'calibration': batches}
    if technique == 'share':
        return share(model, params=size, **repair)
    if technique == 'kernels':
        return prune_kernels(model, amount=size, **repair)
    if technique == 'blocks':
        return remove_blocks(model, blocks=rank_blocks(model, x)[:int(size)], **repair)
    cut = partial(prune_channels, model, x[:1])
    if technique.startswith('torch-pruning'):
        cut = partial(cut, importance=tp.importance.MagnitudeImportance(p=2))
    elif technique != 'channels':
        if batches is None:
            raise LeanError(f'--technique {technique} needs --calibrate N, whose images say what a channel does.')
        cut = partial(cut, criterion='output', scores=output_scores(model, None, batches),
                      global_pruning=technique == 'channels-together')
    if technique not in ('torch-pruning', 'channels-together'):
        return cut(pruning_ratio=size, round_to=ROUND_TO, **repair)
    goal = size * count_params(model)
    ratio = nearest(lambda ratio: count_params(cut(pruning_ratio=ratio, round_to=1)) - goal)
    return cut(pruning_ratio=ratio, round_to=1, **repair)


def nearest(excess: Callable[[float], float], low: float = 0.02, high: float = 0.9, steps: int = 8) -> float:
    """Where a falling function of a ratio comes nearest to zero, by bisection; it may fall in steps."""
    seen = {}
    for _ in range(steps):
        ratio = (low + high) / 2
        seen[ratio] = excess(ratio)
        low, high = (ratio, high) if seen[ratio] > 0 else (low, ratio)
    return min(seen, key=lambda ratio: abs(seen[ratio]))


def images(data_dir: str, split: str, model: nn.Module, device: torch.device, count: int = 0, seed: int = 0) -> Any:
    """Batches of a split's images without augmentation; `count` of them, drawn by `seed`, if it is given."""
    config = model_data_config(model)
    dataset = open_dataset('folder', data_dir, split, 3, config['input_size'][-1])
    if count:
        samples = dataset.reader.samples
        chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:count]
        dataset.reader.samples = [samples[i] for i in chosen]
    return create_eval_loader(dataset, config, 128, device, cache=True)


def run(args: argparse.Namespace) -> None:
    start, device, folder = time.perf_counter(), resolve_device(args.device), writable_dir(args.output)
    model = load_model(args.model).to(device)
    x = next(iter(images(args.data_dir, 'train', model, device, _EXAMPLES)))[0]
    batches = images(args.data_dir, 'train', model, device, args.calibrate, args.seed) if args.calibrate else None
    if args.technique != 'none':
        model = compress(model, args.technique, args.size, batches, x)
    save_model(model, folder / 'last.safetensors')
    result = {
        'top1': evaluate(model, images(args.data_dir, 'eval', model, device), device)['top1'],
        'params': count_params(model), 'macs': cheapest_macs(model, x[:1]),
        'bytes': (folder / 'last.safetensors').stat().st_size, 'seconds': round(time.perf_counter() - start, 1)}
    with atomic_file(folder / 'result.json') as temporary:
        temporary.write_text(json.dumps(result) + '\n')
    print(json.dumps(result))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog='experiments_compress', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', required=True, metavar='FILE')
    p.add_argument('--technique', required=True, choices=[
        'none', 'share', 'kernels', 'channels', 'channels-by-images', 'channels-together', 'blocks', 'torch-pruning',
        'torch-pruning-cut'])
    p.add_argument('--size', type=float, default=1.)
    p.add_argument('--calibrate', type=int, default=0, metavar='N', help='unlabelled training images (default: none)')
    p.add_argument('--data-dir', required=True, metavar='DIR')
    p.add_argument('--device', default='auto')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--output', required=True, metavar='DIR')
    return p


def main() -> int:
    try:
        run(parser().parse_args())
    except LeanError as e:
        print(f'experiments_compress: {e}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
