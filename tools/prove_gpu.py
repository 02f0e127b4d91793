"""What this project claims of GPUs, proven on one: in parts of at most eight minutes that go on where they stopped.

    python tools/prove_gpu.py --list
    python tools/prove_gpu.py --data-dir CIFAR10                   # the parts that are not done, one after the other
    python tools/prove_gpu.py --part cifar --data-dir CIFAR10      # again and again, until it says that it is done
    python tools/prove_gpu.py --device cpu --quick                 # whether the commands work, on a machine without one

A part is a list of steps, each a command of this project. What a step printed and measured is a line in --results, with
hardware and date; what has ended well on this kind of device is not run again. Training goes on from its last save. A
step that does not fit into --limit is left out from then on, until it gets more. The tables of --page, and which limits
are met, come from these lines. CIFAR10 is a folder with `train/<class>/*` and `test/<class>/*`.
"""
import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
from gpu_page import Row, format_verdicts, write_page

from timm_lean import LeanError
from timm_lean.measure.timing import hardware
from timm_lean.training.device import resolve_device

ROOT = Path(__file__).parents[1]
LIMIT = 480  # seconds of a part
TAIL = 4000  # characters kept of what a command printed
SETTINGS = {
    'fp32': [], 'bf16': ['--amp', 'bf16'], 'channels last': ['--amp', 'bf16', '--channels-last'],
    'compiled': ['--amp', 'bf16', '--channels-last', '--compile']}


class Step(NamedTuple):
    """A command of a part."""
    command: list[str]
    resumes: bool = False  # one that was cut off goes on from what it saved
    measures: bool = False  # it takes --json FILE and writes its rows there


Steps = dict[str, Step]


def tests(args: argparse.Namespace) -> Steps:
    return {'on the device': Step(_pytest(args, 'tests', '-m', 'device and not slow'))}


def benchmarks(args: argparse.Namespace) -> Steps:
    """Every row of `benchmark.py all`; those of networks in every precision and memory format, compiled and not."""
    size = (['--batch-size', '2', '--img-size', '32', '--repeats', '2', '--batches', '1', '2'] if args.quick
            else ['--batch-size', '128', '--img-size', '224', '--batches', '1', '32', '256'])
    few = ['--repeats', '1', '--sample', '10', '--model', 'resnet18'] if args.quick else []
    base = ['tools/benchmark.py', 'all', '--device', args.device, *size]
    steps = {}
    for name, options in SETTINGS.items():
        parts = ['shared_bases', 'conversion', 'regularizers', 'channel_pruning']
        if args.quick and name == 'compiled':  # tells of bfloat16 and channels last as well
            options, parts = [*options, 'aot_eager'], ['shared_bases', 'channel_pruning']
        elif args.quick and name != 'fp32':
            continue
        for part in parts:
            steps[f'{part}, {name}'] = Step([*base, *options, '--only', part], measures=True)
    steps['criteria, entropy'] = Step([*base, '--only', 'criteria', 'entropy'], measures=True)
    steps['eigvals'] = Step(['tools/benchmark.py', 'criteria', '--device', args.device, *few], measures=True)
    return steps


def detector(args: argparse.Namespace) -> Steps:
    """The operators of the stand-in for compiled mmcv, and AMP training by a config with all hooks."""
    few = [
        'train_cfg.max_epochs=2', 'train_cfg.val_interval=1', 'model.backbone.model_args.channels=(8,16,24,32)',
        'model.backbone.model_args.shared_rank=4', 'custom_hooks.1.begin=0', 'custom_hooks.1.end=1',
        *(f'{split}_dataloader.{key}' for split in ('train', 'val', 'test') for key in (
            'batch_size=4', 'dataset.size=64', 'dataset.counts.train=8', 'dataset.counts.val=4')),
    ] if args.quick else []
    return {
        'operators': Step(_pytest(args, 'tests/test_mmdet_ops_device.py')),
        'training': Step([
            'tools/train_det.py', 'mmdet_configs/scenes/retinanet_resnet34_s8u1_pruned_scenes.py', '--amp', '--resume',
            '--data-root', str(args.runs / 'scenes'), '--work-dir', str(args.runs / 'detector'),
            *(['--cfg-options', *few] if few else [])], resumes=True)}


def cifar(args: argparse.Namespace) -> Steps:
    """The paper's recipe (published error of the shared network: 6.30 %) and its dense twin."""
    return {name: _training(args, name, ['--config', name]) for name in ('cifar10_shared', 'cifar10_dense')}


def eigenvalues(args: argparse.Namespace) -> Steps:
    """The paper's protocol on ResNet-56: trained with an L1 penalty, pruned once by each criterion."""
    training = _training(args, 'resnet56_l1', [
        '--model', 'resnet56_cifar', '--opt', 'momentum', '--lr', '0.1', '--weight-decay', '1e-4', '--decay-all',
        '--sched', 'multistep', '--milestones', '100', '150', '--epochs', '200', '--batch-size', '128',
        '--reg', 'l1=1e-4'])
    if args.quick:
        return {'training': training}
    return {'training': training, 'pruning': Step([
        'tools/reproduce.py', 'eigen-pruning', '--data-dir', args.data_dir, '--device', args.device,
        '--model', 'resnet56_cifar', '--checkpoint', str(args.runs / 'resnet56_l1' / 'last.safetensors')])}


def calibration(args: argparse.Namespace) -> Steps:
    few = ['--model', 'resnet18', '--images', '8', '--img-size', '32', '--batch-size', '8'] if args.quick else []
    command = ['tools/benchmark.py', 'calibration', '--device', args.device, *few]
    return {technique: Step([*command, '--technique', technique]) for technique in ('kernels', 'share')}


PARTS: dict[str, Callable[[argparse.Namespace], Steps]] = {
    'tests': tests, 'benchmarks': benchmarks, 'calibration': calibration, 'detector': detector, 'cifar': cifar,
    'eigenvalues': eigenvalues}


def _pytest(args: argparse.Namespace, *options: str) -> list[str]:
    kind = args.device.partition(':')[0]
    return ['-m', 'pytest', *options, '-q', '-k', f'{kind} and fold' if args.quick and 'tests' in options else kind]


def _training(args: argparse.Namespace, name: str, options: Sequence[str]) -> Step:
    data = ['--data-dir', args.data_dir]
    if args.quick:
        data = ['--data', 'digits', '--train-images', '32', '--epochs', '1', '--batch-size', '16']
    fast = ['--amp', 'bf16', '--channels-last'] if args.device.startswith('cuda') else []
    return Step(['-m', 'timm_lean_cli', 'train', *options, *data, *fast, '--cache', '--workers', '0', '--resume',
                 '--device', args.device, '--output', str(args.runs / name)], resumes=True)


def run_part(name: str, args: argparse.Namespace) -> bool:
    """Run what is left of a part, within its time; returns whether all of it has ended well."""
    end, whole = time.monotonic() + args.limit, True
    for step_name, step in PARTS[name](args).items():
        if not fnmatchcase(step_name, args.step):
            continue
        state = _state(args, name, step_name)
        if state == 'done':
            continue
        if state == 'too long':
            print(f'{name}, {step_name} needs more than {args.limit} s: give it more by --limit.')
            whole = False
            continue
        seconds = end - time.monotonic()
        print(f'{name}, {step_name}: {_shown(step.command)}', flush=True)
        row = _run(name, step_name, step, seconds, args)
        if row is None and (step.resumes or seconds < args.limit - 5):
            print(f'{name} is not done. The same command goes on from here.')
            return False
        row = row or {'ok': False, 'limit': args.limit, 'output': f'cut off after {args.limit} s'}
        with args.results.open('a') as file:
            file.write(json.dumps({**_key(args, name, step_name), **row}) + '\n')
        if not row['ok']:
            print(f'{row["output"]}\n{name}, {step_name} failed.')
            return False
        if args.page:
            device = resolve_device(args.device)
            write_page(args.page, device.type, _done(args), hardware(device))
    if whole and args.step == '*':
        print(f'{name} is done: {args.results}')
    if whole and name == 'benchmarks':
        print(format_verdicts(_done(args)))
    return whole


def _run(part: str, name: str, step: Step, seconds: float, args: argparse.Namespace) -> Row | None:
    """Run a command with all the processes it starts; None if it was cut off."""
    args.runs.mkdir(parents=True, exist_ok=True)
    measured = args.runs / 'rows.json'
    measured.unlink(missing_ok=True)
    command = [*step.command, *(['--json', str(measured)] if step.measures else [])]
    start = time.monotonic()
    with subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True, start_new_session=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            output, _ = process.communicate(timeout=max(seconds, 1))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    def neutral(text: str) -> str:
        for path, shown in ((args.runs, 'RUNS'), (args.data_dir or None, 'CIFAR10'), (ROOT, '.')):
            text = text.replace(str(path), shown) if path else text
        return text

    took = round(time.monotonic() - start, 1)
    row: Row = {
        'ok': process.returncode == 0, 'date': str(datetime.date.today()), 'seconds': took,
        'command': [neutral(word) for word in step.command], 'output': neutral(output[-TAIL:])}
    if step.measures and row['ok']:
        row['rows'] = json.loads(measured.read_text())
    return row


def _key(args: argparse.Namespace, part: str, step: str) -> dict[str, Any]:
    return {'part': part, 'step': step, 'quick': args.quick, 'hardware': hardware(resolve_device(args.device))}


def _state(args: argparse.Namespace, part: str, step: str) -> str:
    """'done', 'too long' for the time there is, or 'open'."""
    key = _key(args, part, step)
    rows = [row for row in _rows(args.results) if key.items() <= row.items()]
    if any(row['ok'] for row in rows):
        return 'done'
    return 'too long' if any(row.get('limit', 0) >= args.limit for row in rows) else 'open'


def _done(args: argparse.Namespace) -> list[Row]:
    """Of each step of this kind of device the last row that ended well, in the order of the parts."""
    rows = {(row['part'], row['step']): row for row in _rows(args.results)
            if row['ok'] and _key(args, row['part'], row['step']).items() <= row.items()}
    return [rows[part, step] for part in PARTS for step in PARTS[part](args) if (part, step) in rows]


def _rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _shown(command: Sequence[str]) -> str:
    return f'python {" ".join(command)}'


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--list', action='store_true', help='show the parts and their commands, run nothing')
    p.add_argument('--part', choices=PARTS, action='append', help='run only this part; may be repeated')
    p.add_argument('--step', default='*', metavar='PATTERN', help="only these steps, such as '*, channels last'")
    p.add_argument('--device', default='cuda')
    p.add_argument('--quick', action='store_true', help='tiny sizes: whether the commands work, no figures')
    p.add_argument('--limit', type=float, default=LIMIT, metavar='SECONDS', help=f'of a part (default {LIMIT})')
    p.add_argument('--data-dir', default='', help='CIFAR-10, for the parts cifar and eigenvalues')
    p.add_argument('--results', type=Path, default=ROOT / 'docs/results/gpu.jsonl', metavar='FILE')
    p.add_argument('--page', type=Path, metavar='FILE',
                   help='page with the tables (default docs/benchmarks.md, with --quick none)')
    p.add_argument('--runs', type=Path, default=ROOT / 'output/prove_gpu', metavar='DIR', help='training runs')
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    args.results, args.runs = args.results.absolute(), args.runs.absolute()
    args.page = args.page or (None if args.quick else ROOT / 'docs/benchmarks.md')
    names = args.part or list(PARTS)
    if args.list:
        for name in names:
            for step_name, step in PARTS[name](args).items():
                print(f'{name}, {step_name}: {_shown(step.command)}')
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
