"""One style for every picture, and one way to write it.

Colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/, without their yellow, which is too light for lines on
white): readers with any kind of colour blindness can tell them apart. Nothing here uses pyplot or changes rcParams, so
a notebook that draws with matplotlib itself keeps its backend, its style and its figures.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from timm_lean.checkpoint.files import atomic_file, writable_dir
from timm_lean.errors import LeanError

if TYPE_CHECKING:  # matplotlib is slow to import, and only drawing needs it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['COLORS', 'REFERENCE', 'check_picture', 'layer_figure', 'new_figure', 'save_figure', 'style_axes']

COLORS = ('#0072B2', '#E69F00', '#009E73', '#D55E00', '#CC79A7', '#56B4E9', '#000000')
REFERENCE = '0.5'  # grey of bounds, means and other lines to compare with
_DPI = 120


def new_figure(size: tuple[float, float] = (7.5, 5.), rows: int = 1, columns: int = 1) -> 'tuple[Figure, list[Axes]]':
    """Make a figure and its axes, row by row: `figure, (left, right) = new_figure((9, 3.5), columns=2)`.

    Args:
        size: Width and height in inches.
        rows: Rows of axes; with 0 the figure is empty, to be divided otherwise.
        columns: Columns of axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist() if rows else []
    for each in axes:
        style_axes(each)
    return figure, axes


def layer_figure(names: Sequence[str]) -> 'tuple[Figure, Axes]':
    """Make a figure with one place on the x axis, at 0, 1, 2..., for each of the named layers."""
    figure, (axes,) = new_figure((max(6., 0.25 * len(names) + 2), 4.5))
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axes.grid(visible=False, axis='x')
    return figure, axes


def style_axes(axes: 'Axes') -> None:
    """Give axes the style: colours, a faint grid below the data, no box. After seven colours lines are dashed."""
    from cycler import cycler

    axes.set_prop_cycle(cycler(linestyle=['-', '--']) * cycler(color=COLORS))
    axes.grid(color='0.9')
    axes.set_axisbelow(True)
    axes.spines[['top', 'right']].set_visible(False)


def check_picture(path: str | Path) -> str:
    """Check the name and the folder of a picture before the work of making it.

    Returns:
        Its format, by the end of the name.

    Raises:
        LeanError: A format that matplotlib cannot write, a folder, or a place where files cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path, known = Path(path), FigureCanvasAgg.get_supported_filetypes()
    kind = path.suffix.removeprefix('.').lower()
    if kind not in known:
        raise LeanError(f'The picture {path}: the name must end in one of {", ".join("." + k for k in sorted(known))}.')
    if path.is_dir():
        raise LeanError(f'The picture {path} is a folder; give the name of a file.')
    writable_dir(path.parent)
    return kind


def save_figure(figure: 'Figure', path: str | Path) -> None:
    """Write a figure, whole or not at all, in the format that the name ends in.

    Args:
        figure: As `new_figure` makes it.
        path: `.png`, `.svg`, `.pdf`...

    Raises:
        LeanError: The picture cannot be written.
    """
    kind = check_picture(path)
    try:
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format=kind, dpi=_DPI)
    except OSError as e:
        raise LeanError(f'The picture {path} cannot be written: {e.strerror or e}.') from e
