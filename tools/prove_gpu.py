"""What this project claims of GPUs, proven on one: in parts of at most eight minutes that go on where they stopped.

    python tools/prove_gpu.py --list
    python tools/prove_gpu.py --data-dir CIFAR10                   # the parts that are not done, one after the other
    python tools/prove_gpu.py --part cifar --data-dir CIFAR10      # again and again, until it says that it is done
    python tools/prove_gpu.py --device cpu --quick                 # whether the commands work, on a machine without one

A part is a list of commands of this project. Each command that ended is a line in --results, with what it printed, the
hardware and the date; what has ended well on this kind of device is not run again. Training goes on from its last save.
CIFAR10 is a folder with `train/<class>/*` and `test/<class>/*`.
"""
import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timm_lean import LeanError
from timm_lean.measure.timing import hardware
from timm_lean.training.device import resolve_device

ROOT = Path(__file__).parents[1]
LIMIT = 480  # seconds of a part
TAIL = 4000  # characters kept of what a command printed

Commands = dict[str, list[str]]


def tests(args: argparse.Namespace) -> Commands:
    return {'on the device': ['-m', 'pytest', 'tests/test_device.py', '-q', '-k', args.device.partition(':')[0]]}


def benchmarks(args: argparse.Namespace) -> Commands:
    size = (['--batch-size', '2', '--img-size', '32', '--repeats', '2'] if args.quick
            else ['--batch-size', '128', '--img-size', '224'])
    write = [] if args.quick else ['--write', str(ROOT / 'docs/benchmarks.md')]
    few = ['--repeats', '1', '--sample', '10', '--model', 'resnet18'] if args.quick else []
    return {
        'all': ['tools/benchmark.py', 'all', '--device', args.device, *size, *write],
        'shared, AMP, channels last': [
            'tools/benchmark.py', 'shared', '--device', args.device, '--amp', 'bf16', '--channels-last', *size],
        'criteria': ['tools/benchmark.py', 'criteria', '--device', args.device, *few],
    }


def detector(args: argparse.Namespace) -> Commands:
    """AMP training by a config with all hooks."""
    few = [
        'train_cfg.max_epochs=2', 'train_cfg.val_interval=1', 'model.backbone.model_args.channels=(8,16,24,32)',
        'model.backbone.model_args.shared_rank=4', 'custom_hooks.1.begin=0', 'custom_hooks.1.end=1',
        *(f'{split}_dataloader.{key}' for split in ('train', 'val', 'test') for key in (
            'batch_size=4', 'dataset.size=64', 'dataset.counts.train=8', 'dataset.counts.val=4')),
    ] if args.quick else []
    return {'training': [
        'tools/train_det.py', 'mmdet_configs/scenes/retinanet_resnet34_s8u1_pruned_scenes.py', '--amp', '--resume',
        '--data-root', str(args.runs / 'scenes'), '--work-dir', str(args.runs / 'detector'),
        *(['--cfg-options', *few] if few else [])]}


def cifar(args: argparse.Namespace) -> Commands:
    """The paper's recipe (published error of the shared network: 6.30 %) and its dense twin."""
    return {name: _training(args, name, ['--config', name]) for name in ('cifar10_shared', 'cifar10_dense')}


def eigenvalues(args: argparse.Namespace) -> Commands:
    """The paper's protocol on ResNet-56: trained with an L1 penalty, pruned once by each criterion."""
    training = _training(args, 'resnet56_l1', [
        '--model', 'resnet56_cifar', '--opt', 'momentum', '--lr', '0.1', '--weight-decay', '1e-4', '--decay-all',
        '--sched', 'multistep', '--milestones', '100', '150', '--epochs', '200', '--batch-size', '128',
        '--reg', 'l1=1e-4'])
    if args.quick:
        return {'training': training}
    return {'training': training, 'pruning': [
        'tools/reproduce.py', 'eigen-pruning', '--data-dir', args.data_dir, '--device', args.device,
        '--model', 'resnet56_cifar', '--checkpoint', str(args.runs / 'resnet56_l1' / 'last.safetensors')]}


def calibration(args: argparse.Namespace) -> Commands:
    few = ['--model', 'resnet18', '--images', '8', '--img-size', '32', '--batch-size', '8'] if args.quick else []
    return {'calibration': ['tools/benchmark.py', 'calibration', '--device', args.device, *few]}


PARTS: dict[str, Callable[[argparse.Namespace], Commands]] = {
    'tests': tests, 'benchmarks': benchmarks, 'calibration': calibration, 'detector': detector, 'cifar': cifar,
    'eigenvalues': eigenvalues}


def _training(args: argparse.Namespace, name: str, options: Sequence[str]) -> list[str]:
    data = ['--data-dir', args.data_dir]
    if args.quick:
        data = ['--data', 'digits', '--train-images', '32', '--epochs', '1', '--batch-size', '16']
    fast = ['--amp', 'bf16', '--channels-last'] if args.device.startswith('cuda') else []
    return ['-m', 'timm_lean_cli', 'train', *options, *data, *fast, '--cache', '--workers', '0', '--resume',
            '--device', args.device, '--output', str(args.runs / name)]


def run_part(name: str, args: argparse.Namespace) -> bool:
    """Run what is left of a part, within its time; returns whether all of it has ended well."""
    end, kind = time.monotonic() + LIMIT, hardware(resolve_device(args.device))
    for step, command in PARTS[name](args).items():
        key = {'part': name, 'step': step, 'quick': args.quick, 'hardware': kind}
        if any(row['ok'] and key.items() <= row.items() for row in _rows(args.results)):
            continue
        print(f'{name}, {step}: python {" ".join(command)}', flush=True)
        start = time.monotonic()
        try:
            done = subprocess.run(
                [sys.executable, *command], cwd=ROOT, timeout=max(end - start, 1), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except subprocess.TimeoutExpired:
            print(f'{name} is not done. The same command goes on from here.')
            return False
        row = {**key, 'ok': done.returncode == 0, 'date': str(datetime.date.today()), 'command': command,
               'seconds': round(time.monotonic() - start, 1), 'output': done.stdout[-TAIL:]}
        with args.results.open('a') as file:
            file.write(json.dumps(row) + '\n')
        if not row['ok']:
            print(f'{row["output"]}\n{name}, {step} failed (exit code {done.returncode}).')
            return False
    print(f'{name} is done: {args.results}')
    return True


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--list', action='store_true', help='show the parts and their commands, run nothing')
    p.add_argument('--part', choices=PARTS, action='append', help='run only this part; may be repeated')
    p.add_argument('--device', default='cuda')
    p.add_argument('--quick', action='store_true', help='tiny sizes: whether the commands work, no figures')
    p.add_argument('--data-dir', default='', help='CIFAR-10, for the parts cifar and eigenvalues')
    p.add_argument('--results', type=Path, default=ROOT / 'docs/results/gpu.jsonl', metavar='FILE')
    p.add_argument('--runs', type=Path, default=ROOT / 'output/prove_gpu', metavar='DIR', help='training runs')
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.results, args.runs = args.results.absolute(), args.runs.absolute()
    names = args.part or list(PARTS)
    if args.list:
        for name in names:
            for step, command in PARTS[name](args).items():
                print(f'{name}, {step}: python {" ".join(command)}')
        return 0
    try:
        resolve_device(args.device)
        if not (args.quick or args.data_dir) and {'cifar', 'eigenvalues'} & set(names):
            raise LeanError('The parts cifar and eigenvalues need --data-dir CIFAR10.')
        args.results.parent.mkdir(parents=True, exist_ok=True)
        done = [run_part(name, args) for name in names]  # a part that fails does not keep the next from running
        return 0 if all(done) else 1
    except LeanError as e:
        print(f'prove_gpu: {e}', file=sys.stderr)
        return 2


if __name__ == '__main__':
    sys.exit(main())
