"""Time and memory of calibration against plain forward passes of both networks over the same images.

    python tools/benchmark.py calibration                                     # ResNet-50, 512 images of 224 pixels
    python tools/benchmark.py calibration --technique share --model resnet18 --images 128 --img-size 128

A network with random weights is compressed and calibrated with smooth random images: memory does not depend on their
values, time hardly, by the steps that the solver takes. Memory is the most that the process holds, beyond what it held
before.
"""
import argparse
import json
import resource
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

import timm_lean  # noqa: F401  (registers the models)
from timm_lean.calibration import calibrate
from timm_lean.measure.timing import hardware, synchronize
from timm_lean.pruning import prune_kernels
from timm_lean.sharing import share


class PeakMemory:
    """The most bytes held within, beyond those before."""

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0

    def __enter__(self) -> 'PeakMemory':
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = _resident()
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *args: Any) -> None:
        if self.device.type == 'cuda':
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._stop.set()
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.bytes = max(self.bytes, _resident() - self._before)


def _resident() -> int:
    """Bytes of memory that this process holds."""
    try:
        return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux: the peak so far
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    model = timm.create_model(args.model).to(device).eval()
    pruned = share(model, params=0.8) if args.technique == 'share' else prune_kernels(model, amount=0.5)
    noise = torch.randn(args.images, 3, max(args.img_size // 8, 1), max(args.img_size // 8, 1))
    batches = torch.nn.functional.interpolate(noise, size=args.img_size, mode='bilinear').split(args.batch_size)
    limit = {} if args.memory_limit is None else {'memory_limit': args.memory_limit}
    times = []
    for work in (lambda: forward(model, pruned, batches, device),
                 lambda: calibrate(pruned, model, batches, **limit)):
        synchronize(device)
        start, cpu = time.perf_counter(), time.process_time()
        with PeakMemory(device) as memory:
            work()
            synchronize(device)
        times.append((time.perf_counter() - start, time.process_time() - cpu, memory.bytes))
    (plain, plain_cpu, _), (full, full_cpu, peak) = times
    what = 'shared bases, 80 % of the parameters' if args.technique == 'share' else '50 % of the kernels pruned'
    print(f'{args.model}, {what}, {args.images} images of {args.img_size} pixels, {hardware(device)}')
    print(f'forward passes of both networks {plain:.1f} s ({plain_cpu:.1f} s of processor time), calibration '
          f'{full:.1f} s ({full_cpu:.1f} s): {full / plain:.1f}x, by processor time {full_cpu / plain_cpu:.1f}x')
    print(f'memory beyond networks and images {peak / 2 ** 30:.2f} GiB')
    return {'forward_s': plain, 'calibration_s': full, 'ratio': full / plain, 'ratio_cpu': full_cpu / plain_cpu,
            'peak_bytes': peak}


@torch.no_grad()
def forward(model: torch.nn.Module, pruned: torch.nn.Module, batches: Sequence[torch.Tensor], device: Any) -> None:
    for x in batches:
        for network in (model, pruned):
            network(x.to(device))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--model', default='resnet50')
    p.add_argument('--technique', choices=['kernels', 'share'], default='kernels')
    p.add_argument('--images', type=int, default=512)
    p.add_argument('--img-size', type=int, default=224)
    p.add_argument('--batch-size', type=int, default=32)
    p.add_argument('--memory-limit', type=float, metavar='BYTES', help="for activations (default: the library's)")
    p.add_argument('--device', default='cpu')
    p.add_argument('--json', metavar='FILE', help='also write the figures to this file')
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    figures = run(args)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2))
    return 0


if __name__ == '__main__':
    sys.exit(main())
