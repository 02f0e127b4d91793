"""What a run shows and records: progress bar, `summary.csv`, TensorBoard, `curves.png`."""
import csv
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from timm_lean.checkpoint.files import atomic_file
from timm_lean.measure.pictures import new_figure, save_figure

__all__ = ['RunLog', 'plot_curves']

_DRAW_SECONDS = 20  # drawing takes a while; not after every short epoch
_LINE_SECONDS = 60  # between lines within an epoch where there is no terminal


class RunLog:
    """Records one row of numbers per epoch; the primary process writes.

    Args:
        directory: The run's folder.
        primary: Whether this process writes and shows anything.
    """

    def __init__(self, directory: Path, primary: bool = True):
        self.directory = directory
        self.primary = primary
        self.rows: list[dict[str, float]] = []
        self._drawn = time.monotonic()
        self._writer: Any = None
        if primary:
            try:
                from torch.utils.tensorboard import SummaryWriter
                self._writer = SummaryWriter(str(directory / 'tensorboard'))
            except ImportError:
                pass

    def bar(self, total: int, epoch: int, epochs: int) -> 'tqdm | _Lines':
        """A progress bar for one epoch; a line now and then where there is no terminal."""
        title = f'epoch {epoch + 1}/{epochs}'
        if self.primary and not sys.stderr.isatty():
            return _Lines(total, title)
        return tqdm(
            total=total, desc=title, unit='it', leave=False, dynamic_ncols=True, disable=not self.primary)

    def add(self, row: dict[str, float], epochs: int) -> None:
        """Record an epoch and print its line."""
        self.rows.append(row)
        if not self.primary:
            return
        self.write_csv()
        if self._writer is not None:
            for name, value in row.items():
                if name != 'epoch':
                    self._writer.add_scalar(name, value, int(row['epoch']))
            self._writer.flush()
        shown = '  '.join(f'{name} {value:.4g}' for name, value in row.items() if name not in ('epoch', 'seconds'))
        print(f'epoch {int(row["epoch"])}/{epochs}  {shown}', flush=True)
        if time.monotonic() - self._drawn > _DRAW_SECONDS:
            self.draw()

    def write_csv(self) -> None:
        with atomic_file(self.directory / 'summary.csv') as temporary, open(temporary, 'w', newline='') as f:
            writer = csv.DictWriter(f, fieldnames=list(self.rows[0]) if self.rows else ['epoch'])
            writer.writeheader()
            writer.writerows(self.rows)

    def draw(self) -> None:
        """Write `curves.png`."""
        if self.primary and self.rows:
            plot_curves(self.rows, self.directory / 'curves.png')
            self._drawn = time.monotonic()

    def close(self) -> None:
        self.draw()
        if self._writer is not None:
            self._writer.close()


class _Lines:
    """What training needs of a progress bar, as lines for a log file."""

    def __init__(self, total: int, title: str):
        self.total, self.title = total, title
        self.done, self.shown = 0, time.monotonic()

    def __enter__(self) -> '_Lines':
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_postfix(self, values: dict[str, str], refresh: bool = False) -> None:
        if time.monotonic() - self.shown >= _LINE_SECONDS:
            print(f'{self.title}, step {self.done + 1}/{self.total}  '
                  + '  '.join(f'{name} {value}' for name, value in values.items()), flush=True)
            self.shown = time.monotonic()

    def update(self) -> None:
        self.done += 1


def plot_curves(rows: list[dict[str, float]], path: Path) -> None:
    """Plot losses, regularizer terms and accuracy against the epoch."""
    epochs = [row['epoch'] for row in rows]
    losses = [name for name in rows[0] if 'loss' in name]
    others = [name for name in rows[0] if name in ('train_top1', 'eval_top1', 'eval_top5')]
    figure, (left, right) = new_figure((9, 3.5), columns=2)
    for axes, names, title in ((left, losses, 'loss'), (right, others, 'accuracy, %')):
        for name in names:
            axes.plot(epochs, [row[name] for row in rows], label=name, marker='.' if len(rows) < 30 else None)
        axes.set_xlabel('epoch')
        axes.set_title(title)
        if names:
            axes.legend()
    if any(row[name] > 0 for name in losses for row in rows):
        left.set_yscale('log')
    save_figure(figure, path)
