"""Accuracy of several models against what they cost, as one picture."""
from collections.abc import Sequence
from pathlib import Path

from .pictures import COLORS, check_picture, new_figure, save_figure
from .report import ModelReport
from .table import human_count

__all__ = ['pareto_front', 'plot_tradeoff']

_LARGEST_POINT = 900.  # square typographic points


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points `(cost, accuracy)` no other one beats: none is as accurate and cheaper, or better and no dearer.

    Returns:
        Indices by increasing cost.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def plot_tradeoff(reports: Sequence[ModelReport], path: str | Path) -> None:
    """Draw top-1 accuracy against latency, or against MACs if no latency was measured.

    The area of a point is proportional to the parameters; a line joins the models that no other one beats.

    Args:
        reports: Measured models, all with `top1`.
        path: `.png`, `.svg`, `.pdf`...; written atomically.

    Raises:
        LeanError: The file cannot be written.
    """
    check_picture(path)
    timed = all(r.latency_ms is not None for r in reports)
    costs = [float(r.latency_ms) if r.latency_ms is not None and timed else float(r.macs) for r in reports]
    accuracies = [r.top1 if r.top1 is not None else float('nan') for r in reports]
    most = max(r.params for r in reports)

    figure, (axes,) = new_figure()
    front = pareto_front(list(zip(costs, accuracies, strict=True)))
    axes.plot([costs[i] for i in front], [accuracies[i] for i in front], color='0.75', linewidth=1, zorder=1)
    for i, (report, cost, accuracy) in enumerate(zip(reports, costs, accuracies, strict=True)):
        side = (report.params / most * _LARGEST_POINT) ** 0.5
        axes.scatter([cost], [accuracy], s=side ** 2, color=COLORS[i % len(COLORS)], alpha=0.7, linewidths=0, zorder=2)
        axes.annotate(
            f'{report.name.removesuffix(".safetensors")}\n{human_count(report.params)} parameters', (cost, accuracy),
            xytext=(side / 2 + 3, 0), textcoords='offset points', va='center', fontsize=8)
    if max(costs) > 8 * min(costs):
        axes.set_xscale('log')
    else:
        axes.set_xlim(left=0)
    axes.margins(x=0.3, y=0.15)
    sizes = {r.img_size for r in reports}
    axes.set_xlabel(
        f'milliseconds per image, batch 1 on {reports[0].device}' if timed
        else 'multiply-accumulates' + (f' at {sizes.pop()} px' if len(sizes) == 1 else ", each at its own image size"))
    axes.set_ylabel('top-1 accuracy (%)')
    save_figure(figure, path)
