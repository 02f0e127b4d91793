#!/usr/bin/env python3
"""What `import timm_lean` costs beyond `import timm`: medians of fresh interpreters, run in turn.

    python tools/bench_import.py --repeats 7
"""
import argparse
import statistics
import subprocess
import sys
import time

STATEMENTS = ('import timm', 'import timm_lean')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--repeats', type=int, default=7)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f'--repeats must be at least 1, got {args.repeats}')
    times: dict[str, list[float]] = {s: [] for s in STATEMENTS}
    for repeat in range(-1, args.repeats):  # the first round fills the file cache
        for statement in STATEMENTS:
            start = time.perf_counter()
            subprocess.run([sys.executable, '-c', statement], check=True)
            if repeat >= 0:
                times[statement].append(time.perf_counter() - start)
    medians = [statistics.median(times[s]) for s in STATEMENTS]
    for statement, seconds in zip(STATEMENTS, medians, strict=True):
        print(f'{statement:18} {seconds:6.2f} s')
    print(f'ratio              {medians[1] / medians[0]:6.3f}')


if __name__ == '__main__':
    main()
