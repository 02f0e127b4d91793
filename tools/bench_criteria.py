"""Speed of the eight pruning criteria: closed forms against batched torch.linalg and a loop over kernels.

    python tools/bench_criteria.py                    # all 3 x 3 kernels of ResNet-50, this CPU
    python tools/bench_criteria.py --device cuda

`linalg` computes the same eight scores by torch.linalg (eigenvalues and singular values once each), `loop` by
numpy.linalg kernel by kernel, on a sample, scaled up. On a GPU `eigvals` is torch.linalg.eigvals alone.
"""
import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parent))
from timing import print_timings

from timm_lean.measure.timing import Timing, hardware, time_in_turn
from timm_lean.pruning import CRITERIA, all_scores


def by_linalg(kernels: torch.Tensor) -> dict[str, torch.Tensor]:
    """The eight scores of `[N, 3, 3]` by batched torch.linalg, in the kernels' dtype."""
    eigenvalues = torch.linalg.eigvals(kernels)
    moduli, reals = eigenvalues.abs(), eigenvalues.real.abs()
    return {
        'det': torch.linalg.det(kernels).abs(),
        'det_gram': torch.linalg.det(kernels.mT @ kernels).abs(),
        'min_eig': moduli.amin(1), 'spectral_radius': moduli.amax(1),
        'min_eig_real': reals.amin(1), 'spectral_radius_real': reals.amax(1),
        'spectral_norm': torch.linalg.svdvals(kernels)[:, 0],
        'weight': kernels.abs().mean((1, 2)),
    }


def by_loop(kernels: np.ndarray) -> list[list[float]]:
    """The eight scores by numpy.linalg, one kernel at a time."""
    scores = []
    for k in kernels:
        eigenvalues = np.linalg.eigvals(k)
        moduli, reals = np.abs(eigenvalues), np.abs(eigenvalues.real)
        scores.append([
            abs(np.linalg.det(k)), abs(np.linalg.det(k.T @ k)), moduli.min(), reals.min(), moduli.max(), reals.max(),
            np.linalg.norm(k, 2), np.abs(k).mean()])
    return scores


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print; one dict per form."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = timm.create_model(args.model)
    weights = [m.weight.detach().to(device) for m in model.modules()
               if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    kernels = torch.cat([w.flatten(0, 1) for w in weights])
    sample = kernels[::max(len(kernels) // args.sample, 1)].cpu().numpy()
    print(f'{len(CRITERIA)} criteria of the {len(kernels):,} 3 x 3 kernels of {args.model} in {len(weights)} layers, '
          f'{hardware(device)}, {args.repeats} interleaved repeats; loop: {len(sample):,} kernels, scaled up')
    forms = {
        'closed': lambda: [all_scores(w) for w in weights],
        'linalg': lambda: by_linalg(kernels),
        'loop': lambda: by_loop(sample),
    }
    if device.type == 'cuda':
        kernels = kernels[:args.gpu_sample]
        forms['eigvals'] = lambda: torch.linalg.eigvals(kernels)
        print(f'linalg and eigvals: the first {len(kernels):,} kernels, scaled up')
    total = sum(w.numel() for w in weights) // 9
    timings = time_in_turn(forms, device, args.repeats, warmup=1)
    factors = {'loop': total / len(sample), 'linalg': total / len(kernels), 'eigvals': total / len(kernels)}
    scaled = {name: Timing([s * factors.get(name, 1) for s in t.seconds]) for name, t in timings.items()}
    rows = print_timings('time for all kernels', scaled, ['closed'])
    fast = scaled['closed']
    part = [w[:len(w) // 10 or 1] for w in weights]
    few = sum(w.numel() for w in part) // 9
    tenth = time_in_turn({'': lambda: [all_scores(w) for w in part]}, device, args.repeats, warmup=1)['']
    print(f'\nclosed, per kernel: {1e9 * fast.median / total:.0f} ns of {total:,}, '
          f'{1e9 * tenth.median / few:.0f} ns of {few:,}')
    return rows


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='resnet50')
    p.add_argument('--device', default='cpu')
    p.add_argument('--threads', type=int, default=torch.get_num_threads())
    p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--sample', type=int, default=10_000, help='kernels of the loop')
    p.add_argument('--gpu-sample', type=int, default=100_000, help='kernels of torch.linalg on a GPU')
    p.add_argument('--json', metavar='FILE', help='also write the rows to this file')
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    rows = run(args)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=2))
    return 0


if __name__ == '__main__':
    sys.exit(main())
