"""The queue behind `tools/experiments.py`: runs described in YAML, each with a folder and a row of results of its own.

    define:                        # pieces of commands, used below as {quick}
      quick: timm-lean train --config cifar10_quick --data-dir {data} --seed {seed} --output {run} --resume
    runs:
      - question: 1                # which file of results, and which part of the page
        name: shared {rank}        # a changed command needs a new name: what has a row is not run again
        each: {rank: [8, 16]}      # every combination is a run (of a list of maps: those of each map); its values are
                                   # kept in the row as `settings`
        seeds: [0, 1, 2]
        command: '{quick} --model-args shared_rank={rank} unique_rank=1'

Filled in as well: {data}, the images; {bccd}, those of BCCD with their boxes; {run}, the run's folder; {runs}, the
folder of all runs, for what starts from the result of an earlier one: {runs}/q1/dense/seed{seed}/last.safetensors. A
command can be stopped at any time and is given again as it is, so it has to go on by itself. It leaves
`last.safetensors` and `summary.csv`, as `timm-lean train` does, or a `result.json` with the same numbers.

A run's lock is held by its process, not by the queue: a second queue started beside the first takes the next free run,
and one started after a kill waits for what is still training.
"""
import contextlib
import csv
import datetime
import fcntl
import itertools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from PIL import Image, JpegImagePlugin

import timm_lean
from timm_lean import LeanError
from timm_lean.checkpoint.files import atomic_dir, writable_dir
from timm_lean.measure.report import model_reports
from timm_lean.measure.timing import hardware

ROOT = Path(__file__).parents[1]
_RESULT = 'result.json'


@dataclass(frozen=True)
class Run:
    """One command with one seed.

    Attributes:
        question: Number of the question it helps to answer.
        name: What it is, without the seed.
        seed: Its seed.
        template: The command with {data}, {bccd}, {run} and {runs} not yet filled in.
        settings: The values of `each` that made it.
    """
    question: int
    name: str
    seed: int
    template: str
    settings: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def label(self) -> str:
        """`q1/dense/seed0`: for patterns, and below the folder of all runs."""
        return f'q{self.question}/{re.sub(r"[^A-Za-z0-9.+=]+", "-", self.name)}/seed{self.seed}'

    @property
    def needs(self) -> str | None:
        """Which images it works on, 'data' or 'bccd'; None if it needs no folder."""
        return next((name for name in ('data', 'bccd') if f'{{{name}}}' in self.template), None)

    def command(self, runs: Path | str = 'RUNS', data: Path | str = 'DATA', bccd: Path | str = 'BCCD') -> str:
        """The command with folders filled in; without arguments, as the row shows it."""
        run = Path(runs) / self.label
        folders = dict(data=data, bccd=bccd, run=run, runs=runs)
        return _fill(self.template, **{name: shlex.quote(str(folder)) for name, folder in folders.items()})


def read_queue(path: Path | str) -> list[Run]:
    """The runs of a queue file, question by question, and seed by seed within each.

    Raises:
        LeanError: The file cannot be read, or an entry lacks something or has something unknown.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise LeanError(f'The queue {path} cannot be read: {e}') from e
    if not isinstance(content, dict) or not isinstance(content.get('runs'), list):
        raise LeanError(f'The queue {path} must hold a list "runs:".')
    runs = [run for entry in content['runs'] for run in _expand(entry, content.get('define') or {})]
    labels = [run.label for run in runs]
    for label in labels:
        if labels.count(label) > 1:
            raise LeanError(f'The queue {path} has two runs {label!r}; give them different names.')
    return sorted(runs, key=lambda run: (run.question, run.seed))


def _expand(entry: Any, define: dict[str, str]) -> Iterator[Run]:
    needed, known = {'question', 'name', 'seeds', 'command'}, {'question', 'name', 'seeds', 'command', 'each'}
    if not isinstance(entry, dict) or not needed <= entry.keys() <= known:
        raise LeanError(f'An entry of the queue needs {", ".join(sorted(needed))} and may have each, got {entry!r}.')
    each = entry.get('each') or {}
    combinations = [dict(zip(grid, values, strict=True)) for grid in (each if isinstance(each, list) else [each])
                    for values in itertools.product(*grid.values())]
    for settings, seed in itertools.product(combinations, entry['seeds']):
        folders = {name: f'{{{name}}}' for name in ('data', 'bccd', 'run', 'runs')}  # filled in later
        template = _fill(_fill(entry['command'], **define, **settings, **folders, seed='{seed}'),
                         **settings, **folders, seed=seed)
        yield Run(entry['question'], _fill(entry['name'], **settings), seed, template, settings)


def _fill(text: str, **values: Any) -> str:
    try:
        return text.format_map(values)
    except (KeyError, ValueError, IndexError) as e:
        raise LeanError(f'{text!r} in the queue: {e} is not one of {", ".join(values)}.') from e


class Queue:
    """Runs, their folders, and the rows of those that are finished.

    Args:
        runs: What to run, in this order.
        folder: Folder of all runs.
        results: Folder of the rows, one `qN.jsonl` for each question.
        data: The images; None if no command asks for any.
        bccd: The same for those of BCCD.
        commit: Of the code that runs; None to ask git.
    """

    def __init__(
            self, runs: Sequence[Run], folder: Path, results: Path, data: Path | None = None, bccd: Path | None = None,
            commit: str | None = None):
        self.runs, self.folder, self.results, self.commit = runs, folder, results, commit or find_commit()
        self.images = {'data': data, 'bccd': bccd}

    def work(self, nice: int = 19, say: Callable[[str], None] = print) -> int:
        """Run what has no row yet, one after the other.

        Args:
            nice: Priority of the commands, 19 for the lowest.
            say: Called with a line for everything that happens.

        Returns:
            How many runs failed. Their output is in `log.txt` of their folders; the next call tries them again.
        """
        failed = set()
        for wait in (False, True):  # first what no other process holds
            for run in self.runs:
                with self._lock(run, wait) as lock:
                    if lock is None or run in failed or self.row(run) is not None:
                        continue
                    say(f'{run.label}: {run.command()}')
                    code = self._execute(run, nice, lock)
                    if code:
                        failed.add(run)
                        say(f'{run.label}: failed with exit code {code}, see {self.folder / run.label / "log.txt"}')
                        continue
                    row = self._add_row(run)
                    say(f'{run.label}: {format_result(row)}')
        return len(failed)

    def row(self, run: Run) -> dict[str, Any] | None:
        """The run's row, if it is finished."""
        rows = read_rows(self.results / f'q{run.question}.jsonl')
        return next((row for row in rows if (row['name'], row['seed']) == (run.name, run.seed)), None)

    def status(self) -> str:
        """A line for each run: its result, or how far it is."""
        lines = []
        for run in self.runs:
            row, epochs = self.row(run), _epochs(self.folder / run.label)
            with self._lock(run, wait=False) as lock:
                state = format_result(row) if row else 'running' if lock is None else 'to do'
            if not row and epochs:
                state += f', {len(epochs)} epochs done, {float(epochs[-1]["eval_top1"]):.2f} %'
            lines.append(f'{run.label:44} {state}')
        return '\n'.join(lines)

    @contextlib.contextmanager
    def _lock(self, run: Run, wait: bool) -> Iterator[Any]:
        """Yield the run's lock, or None if another process holds it."""
        with open(writable_dir(self.folder / run.label) / '.lock', 'w') as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield None
            else:
                yield lock

    def _execute(self, run: Run, nice: int, lock: Any) -> int:
        program, *arguments = shlex.split(
            run.command(self.folder, **{name: folder or '' for name, folder in self.images.items()}))
        if program not in ('timm-lean', 'python'):
            raise LeanError(f'{run.label}: a command starts with timm-lean or python, got {program!r}.')
        start = [sys.executable, *(['-m', 'timm_lean'] if program == 'timm-lean' else [])]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
        with open(self.folder / run.label / 'log.txt', 'a') as log:
            process = subprocess.Popen(
                ['nice', '-n', str(nice), *start, *arguments], cwd=ROOT, env={**os.environ, 'PYTHONPATH': path},
                stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()])
            try:
                return process.wait()
            finally:  # also when this process is told to stop
                process.terminate()
                process.wait()

    def _add_row(self, run: Run) -> dict[str, Any]:
        images = self.images[run.needs] if run.needs else None
        row = {
            'question': run.question, 'name': run.name, 'seed': run.seed, **measure(self.folder / run.label),
            'settings': run.settings, 'data': describe_images(images) if images else 'digits',
            'command': run.command(), 'commit': self.commit,
            'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__,
                         'timm_lean': timm_lean.__version__},
            'hardware': hardware(torch.device('cuda' if torch.cuda.is_available() else 'cpu')),
            'date': datetime.date.today().isoformat()}
        with open(writable_dir(self.results) / f'q{run.question}.jsonl', 'a') as f:
            f.write(json.dumps(row) + '\n')  # one write: queues side by side do not mix their lines
        return row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of results; none if there is no file.

    Raises:
        LeanError: A line is not a row.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
        try:
            row = json.loads(line)
            missing = {'question', 'name', 'seed'} - row.keys()
        except (ValueError, AttributeError) as e:
            raise LeanError(f'{path}, line {number} is not a row of results ({e}). Remove it.') from e
        if missing:
            raise LeanError(f'{path}, line {number} has no {", ".join(sorted(missing))}. Remove it.')
        rows.append(row)
    return rows


def measure(folder: Path) -> dict[str, Any]:
    """What a finished run gives: its `result.json`, or the last network of a training."""
    if (folder / _RESULT).is_file():
        return json.loads((folder / _RESULT).read_text())
    report, = model_reports([str(folder / 'last.safetensors')])
    epochs = _epochs(folder)
    return {
        'top1': float(epochs[-1]['eval_top1']), 'params': report.params, 'macs': report.macs, 'bytes': report.bytes,
        'epochs': len(epochs), 'seconds': round(sum(float(epoch['seconds']) for epoch in epochs), 1)}


def _epochs(folder: Path) -> list[dict[str, str]]:
    """The lines of a training's `summary.csv`."""
    path = folder / 'summary.csv'
    if not path.is_file():
        return []
    with open(path, newline='') as f:
        return [line for line in csv.DictReader(f) if line.get('eval_top1')]


def format_result(row: dict[str, Any]) -> str:
    """The number of a row that counts, with its unit."""
    return f'{row["top1"]:.2f} %' if 'top1' in row else f'AP {row["ap"]:.3f}'


def choose(runs: Sequence[Run], patterns: Sequence[str]) -> list[Run]:
    """The runs whose label matches one of the shell patterns, in the patterns' order; all of them without patterns.

    Raises:
        LeanError: A pattern matches none.
    """
    chosen: list[Run] = [] if patterns else list(runs)
    for pattern in patterns:
        found = [run for run in runs if fnmatchcase(run.label, pattern)]
        if not found:
            raise LeanError(f'--only {pattern!r} matches no run. Labels are like {runs[0].label}.')
        chosen += [run for run in found if run not in chosen]
    return chosen


def find_commit() -> str:
    """The commit of the code that runs, with a + behind it if files were changed since."""
    try:
        git = ['git', '-C', str(ROOT)]
        head = subprocess.check_output([*git, 'rev-parse', '--short', 'HEAD'], text=True, stderr=subprocess.DEVNULL)
        changed = subprocess.check_output([*git, 'status', '--porcelain', '-uno'], text=True)
    except (OSError, subprocess.CalledProcessError):
        return timm_lean.__version__
    return head.strip() + ('+' if changed else '')


def describe_images(folder: Path) -> str:
    """How the images of a folder are stored: `PNG`, or `JPEG, quality 75, chroma halved`."""
    files = [*sorted((folder / 'train').glob('*/*')), *sorted((folder / 'images').glob('*'))]
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        raise LeanError(f'{folder} holds no images train/CLASS/IMAGE or images/IMAGE.')
    with Image.open(file) as image:
        if not isinstance(image, JpegImagePlugin.JpegImageFile):
            return str(image.format)
        # the last entry of the usual luminance table is 99 at quality 50 (ITU T.81, table K.1), scaled as libjpeg does;
        # a large entry, since they are rounded
        scale = 100 * image.quantization[0][63] / 99
        quality = 100 - scale / 2 if scale <= 100 else 5000 / scale
        halved = JpegImagePlugin.get_sampling(image) == 2
        return f'JPEG, quality {quality:.0f}' + (', chroma halved' if halved else '')


def image_folder(data: Path, folder: Path) -> Path:
    """A folder of class folders: the given one, or torchvision's CIFAR-10 unpacked once into PNGs.

    Args:
        data: Folder with train/ and test/, or what `torchvision.datasets.CIFAR10(root=...)` takes.
        folder: Where to unpack.
    """
    if not (data / 'cifar-10-batches-py').is_dir():
        return data
    from torchvision.datasets import CIFAR10
    target = folder / 'cifar10-png'
    if not target.is_dir():
        with atomic_dir(target) as temporary:
            for split in ('train', 'test'):
                dataset = CIFAR10(str(data), train=split == 'train')
                for number, (image, label) in enumerate(dataset):
                    file = temporary / split / dataset.classes[label] / f'{number:05}.png'
                    file.parent.mkdir(parents=True, exist_ok=True)
                    image.save(file)
    return target
