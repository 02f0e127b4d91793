"""Speed and memory of `dataset_entropy` against bare decoding with the same worker processes.

    python tools/benchmark.py entropy --data-dir DIR --workers 2
    python tools/benchmark.py entropy                               # on generated JPEG images

Anchors, by PIL in the same data loader and batches: `decode`, what timm's and torchvision's image folders do per image
(`Image.open(path).convert('RGB')`, pixels left where they are), and `load`, the same without the conversion. A ratio of
0.9 says that entropy takes 1 / 0.9 of the anchor's time. Memory is the largest of the process and its workers over
50,000 images, in the first and in the last tenth.
"""
import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from timm_lean.depth.entropy import _BATCH, _as_is, _Measure, _stream
from timm_lean.depth.images import ImageSource, open_source
from timm_lean.errors import LeanError
from timm_lean.measure.timing import time_in_turn


class _Decode(Dataset):
    """Bare decoding of lists of files."""

    def __init__(self, source: ImageSource, convert: bool):
        self.source, self.convert = source, convert

    def __getitem__(self, places: Sequence[int]) -> int:
        for place in places:
            with Image.open(self.source.name(place)) as image:
                if self.convert:
                    image.convert('RGB')
                else:
                    image.load()
        return len(places)


def decode(source: ImageSource, images: int, workers: int, convert: bool) -> None:
    batches = [range(i, min(i + _BATCH, images)) for i in range(0, images, _BATCH)]
    loader = DataLoader(_Decode(source, convert), sampler=batches, batch_size=None, num_workers=workers,
                        collate_fn=_as_is)
    for _ in loader:
        pass


def measure(source: ImageSource, images: int, workers: int, mode: str) -> None:
    for _ in _stream(_Measure(source, np.arange(len(source)), mode, 256), range(images), workers, False):
        pass


def _own_memory() -> int:
    """Bytes of memory that this process and its children have to themselves (proportional set size)."""
    total, me = 0, os.getpid()
    for entry in os.listdir('/proc'):
        if entry.isdigit():
            try:
                fields = Path(f'/proc/{entry}/stat').read_text().rsplit(')', 1)[1].split()
                if int(entry) == me or int(fields[1]) == me:
                    lines = Path(f'/proc/{entry}/smaps_rollup').read_text().splitlines()
                    total += next(int(line.split()[1]) for line in lines if line.startswith('Pss:')) * 1024
            except (OSError, IndexError, StopIteration, PermissionError):
                continue
    return total


def memory(source: ImageSource, images: int, workers: int, mode: str) -> tuple[int, int]:
    """Largest memory in bytes during the first and the last tenth of a pass over `images` images."""
    peaks, seen = [0, 0], 0
    repeated = np.arange(images) % len(source)
    for batch in _stream(_Measure(source, repeated, mode, 256), range(images), workers, False):
        seen += len(batch.places)
        part = 0 if seen <= images / 10 else 1 if seen > 0.9 * images else None
        if part is not None and seen // _BATCH % 4 == 0:
            peaks[part] = max(peaks[part], _own_memory())
    return peaks[0], peaks[1]


def generate(folder: Path, count: int, size: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (max(size // 8, 2), max(size // 8, 2), 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(folder / f'{i:06d}.jpg', quality=90)


def bench(source: ImageSource, args: argparse.Namespace) -> list[dict[str, Any]]:
    images = min(args.images, len(source))
    forms: dict[str, Callable[[], None]] = {
        'decode': lambda: decode(source, images, args.workers, True),
        'load': lambda: decode(source, images, args.workers, False),
        **{mode: (lambda mode=mode: measure(source, images, args.workers, mode)) for mode in args.modes},
    }
    timings = time_in_turn(forms, torch.device('cpu'), args.repeats, warmup=1)
    rows = []
    print(f'{images} images, {args.workers} workers, {args.repeats} interleaved repeats')
    print(f'{"":14}{"images/s":>10}{"of decode":>12}{"of load":>12}')
    for name in forms:
        ratios = {a: timings[a].ratio(timings[name]) for a in ('decode', 'load')}
        rate = images / timings[name].median
        print(f'{name:14}{rate:>10.0f}{ratios["decode"]:>11.3f}x{ratios["load"]:>11.3f}x')
        rows.append({'form': name, 'images_per_second': rate, **ratios})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='benchmark entropy', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', help='folder of images (default: generated ones)')
    parser.add_argument('--images', type=int, default=4000, help='images per timed pass')
    parser.add_argument('--size', type=int, default=64, help='side of generated images')
    parser.add_argument('--modes', nargs='+', default=['pooled', 'per_channel', 'joint'])
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--memory-images', type=int, default=50_000, help='0 leaves out the memory')
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            if not args.data_dir:
                generate(Path(temporary), min(args.images, 2000), args.size)
            source = open_source(args.data_dir or temporary)
            bench(source, args)
            if args.memory_images:
                first, last = memory(source, args.memory_images, args.workers, args.modes[0])
                print(f'memory over {args.memory_images:,} images: {first / 2**20:.0f} MiB in the first tenth, '
                      f'{last / 2**20:.0f} MiB in the last ({last / first:.3f}x)')
    except LeanError as e:
        print(f'benchmark entropy: {e}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
