"""The claim, checked: a sweep over depth at equal budget, with the bound drawn in.

https://arxiv.org/abs/2106.14190 claims that networks deeper than the data's entropy calls for train longer and are no
more accurate. For each depth the family's member of equal budget is trained with several seeds; accuracy, time per
epoch and the share of near-identity residual blocks are put against depth.
"""
import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from timm_lean.checkpoint.files import atomic_file, writable_dir
from timm_lean.checkpoint.format import load_model
from timm_lean.depth.family import FAMILIES, bounded_model, check_family, describe_member
from timm_lean.errors import LeanError
from timm_lean.measure import count_params
from timm_lean.measure.conv_depth import conv_depth, module_depths
from timm_lean.measure.identity import identity_ratios, near_identity_share
from timm_lean.measure.pictures import REFERENCE, new_figure, save_figure
from timm_lean.training import TrainConfig, train

from .data import create_eval_loader, model_data_config, open_dataset

__all__ = ['SWEEP_TRAINING', 'Run', 'Sweep', 'check_sweep', 'compare', 'run_sweep', 'summarize', 'verify_bound']

SWEEP_TRAINING: dict[str, Any] = dict(epochs=15, batch_size=32, opt='momentum', lr=0.05, cache=True)
"""Settings of a sweep's runs that suit small networks."""

_IDENTITY_IMAGES = 512


@dataclass(frozen=True)
class Sweep:
    """Settings of a depth sweep.

    Attributes:
        bound: The depth bound that is checked.
        depths: Depths to train; the family's members may be a little shallower.
        seeds: Seeds; each trains every depth.
        family: Family of the networks.
        budget: Cost of every network; the parameters of the default baseline if None.
        num_classes: Number of classes.
        train: Settings of every run, without model, seed and output.
        output: Folder for runs and results; a sweep that was stopped continues there.
    """
    bound: int
    depths: Sequence[int]
    seeds: Sequence[int]
    family: str
    budget: str | None
    num_classes: int
    train: TrainConfig
    output: str


@dataclass
class Run:
    """One trained network.

    Attributes:
        depth: Convolutions on its longest path.
        seed: Its seed.
        params: Its parameters.
        top1: Accuracy after the last epoch, per cent.
        epoch_seconds: Median over the epochs.
        near_identity: Share of its residual blocks that are near the identity; None without such blocks.
        ratios: `||F(x)|| / ||x||` of each residual block.
        places: Convolutions on the longest path from the input to the end of each of these blocks.
    """
    depth: int
    seed: int
    params: int
    top1: float
    epoch_seconds: float
    near_identity: float | None = None
    ratios: dict[str, float] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)


def default_depths(bound: int, least: int) -> list[int]:
    """Depths around a bound, from a quarter of it to three times."""
    return sorted({max(least, round(bound * f)) for f in (0.25, 0.5, 1, 1.5, 2, 3)})


def run_sweep(sweep: Sweep) -> list[Run]:
    """Train every depth with every seed; the seeds are the outer loop, so that slow hours fall on all depths alike.

    Raises:
        LeanError: Settings that cannot be met.
    """
    size = sweep.train.img_size or 32
    networks = [(*describe_member(sweep.family, depth, sweep.budget, sweep.num_classes, size),
                 bounded_model(sweep.family, depth, sweep.budget, sweep.num_classes, size))
                for depth in sweep.depths]  # all of them before the first is trained: a depth may be out of reach
    folder = writable_dir(sweep.output)
    done_file = folder / 'runs.json'
    ignored = ('output', 'depths', 'seeds')
    settings = json.loads(json.dumps({k: v for k, v in asdict(sweep).items() if k not in ignored}))
    runs: list[Run] = []
    if done_file.exists():
        stored = json.loads(done_file.read_text())
        if stored['settings'] != settings:
            raise LeanError(f'{folder} holds a sweep with other settings. Choose another output folder.')
        runs = [Run(**r) for r in stored['runs']]
    done = {(r.depth, r.seed) for r in runs}
    for seed in sweep.seeds:
        for name, arguments, model in networks:
            real = conv_depth(model, (3, size, size))
            if (real, seed) in done:
                continue
            done.add((real, seed))
            output = folder / f'depth{real}_seed{seed}'
            config = replace(
                sweep.train, model=name, seed=seed, output=str(output), resume=output.exists(),
                model_args={k: v for k, v in arguments.items() if k != 'num_classes'})
            last = train(config)['last']
            with open(output / 'summary.csv', newline='') as f:
                seconds = [float(row['seconds']) for row in csv.DictReader(f)]
            ratios = _ratios(output / 'last.safetensors', config)
            places = module_depths(model, ratios, (3, size, size))
            runs.append(Run(real, seed, count_params(model), last['eval_top1'], statistics.median(seconds),
                            near_identity_share(ratios) if ratios else None, ratios, places))
            with atomic_file(done_file) as temporary:
                temporary.write_text(json.dumps({'settings': settings, 'runs': list(map(asdict, runs))}, indent=1))
    return runs


def _ratios(checkpoint: Path, config: TrainConfig) -> dict[str, float]:
    model = load_model(checkpoint)
    data_config = model_data_config(model)
    dataset = open_dataset(config.data, config.data_dir, 'eval', img_size=data_config['input_size'][-1],
                           limit=_IDENTITY_IMAGES)
    try:
        return identity_ratios(model, create_eval_loader(dataset, data_config, 128, torch.device('cpu'), workers=0))
    except LeanError:
        return {}  # the shallowest networks have no block with an identity shortcut


def summarize(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row per depth: means over the seeds."""
    rows = []
    for depth in sorted({r.depth for r in runs}):
        group = [r for r in runs if r.depth == depth]
        shares = [r.near_identity for r in group if r.near_identity is not None]
        ratios = [v for r in group for v in r.ratios.values()]
        rows.append({
            'depth': depth, 'params': group[0].params, 'seeds': len(group),
            'top1': statistics.mean(r.top1 for r in group),
            'top1_std': statistics.stdev(r.top1 for r in group) if len(group) > 1 else 0.,
            'epoch_seconds': statistics.median(r.epoch_seconds for r in group),
            'near_identity': statistics.mean(shares) if shares else None,
            'median_ratio': statistics.median(ratios) if ratios else None,
        })
    return rows


def compare(runs: Sequence[Run], bound: int) -> list[dict[str, Any]]:
    """The deepest network within the bound against every deeper one, paired by seed.

    Returns:
        For each deeper network the accuracy of the bounded one minus its own in points, the p-value of scipy's paired
        t-test (None for fewer than two seeds or no variation), and the share of the time per epoch saved.
    """
    from scipy.stats import ttest_rel
    within = [r.depth for r in runs if r.depth <= bound]
    if not within:
        return []
    chosen = {r.seed: r for r in runs if r.depth == max(within)}
    rows = []
    for depth in sorted({r.depth for r in runs if r.depth > bound}):
        pairs = [(chosen[r.seed], r) for r in runs if r.depth == depth and r.seed in chosen]
        if not pairs:
            continue
        differences = [a.top1 - b.top1 for a, b in pairs]
        p = None
        if len(pairs) > 1 and len(set(differences)) > 1:
            p = float(ttest_rel([a.top1 for a, _ in pairs], [b.top1 for _, b in pairs]).pvalue)
        rows.append({
            'bounded': max(within), 'deeper': depth, 'seeds': len(pairs), 'difference': statistics.mean(differences),
            'p': p, 'time_saved': 1 - statistics.median(a.epoch_seconds / b.epoch_seconds for a, b in pairs)})
    return rows


def format_sweep(rows: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]], bound: int) -> str:
    """The sweep as a Markdown table and sentences."""
    lines = [f'bound: {bound} convolution layers', '',
             '| conv depth | params | top-1 % (mean ± std, seeds) | s / epoch | near-identity blocks | median F(x)/x |',
             '|---|---|---|---|---|---|']
    for r in rows:
        share = '-' if r['near_identity'] is None else f'{100 * r["near_identity"]:.0f} %'
        ratio = '-' if r['median_ratio'] is None else f'{r["median_ratio"]:.2f}'
        within = ' (within)' if r['depth'] <= bound else ''
        top1 = f'{r["top1"]:.2f} ± {r["top1_std"]:.2f} ({r["seeds"]})'
        lines.append(
            f'| {r["depth"]}{within} | {r["params"]:,} | {top1} | {r["epoch_seconds"]:.2f} | {share} | {ratio} |')
    lines.append('')
    for c in comparisons:
        p = 'no test with so few seeds' if c['p'] is None else f'p = {c["p"]:.3f}'
        lines.append(f'- depth {c["bounded"]} minus depth {c["deeper"]}: {c["difference"]:+.2f} points ({p}, '
                     f'{c["seeds"]} seeds), {100 * c["time_saved"]:.0f} % of the time per epoch saved')
    return '\n'.join(lines)


def plot_sweep(runs: Sequence[Run], bound: int, file: Path) -> None:
    """Accuracy, time per epoch and the blocks' ratios against depth, the bound as a line."""
    rows = summarize(runs)
    depths = [r['depth'] for r in rows]
    figure, axes = new_figure((14, 4), columns=3)
    axes[0].errorbar(depths, [r['top1'] for r in rows], [r['top1_std'] for r in rows], marker='o', capsize=3)
    axes[0].set_ylabel('top-1 %')
    axes[1].plot(depths, [r['epoch_seconds'] for r in rows], marker='o')
    axes[1].set_ylabel('seconds per epoch')
    for depth in depths:
        points = [(r.places[name], ratio) for r in runs if r.depth == depth for name, ratio in r.ratios.items()]
        axes[2].scatter(
            [x for x, _ in points], [y for _, y in points], s=8, alpha=0.6, label=f'network of {depth}')
    axes[2].set_ylabel('‖F(x)‖ / ‖x‖ of each block')
    axes[2].set_xlabel('convolutions up to the end of the block')
    for axis in axes[:2]:
        axis.set_xlabel('convolutions on the longest path')
    for axis in axes:
        axis.axvline(bound, color=REFERENCE, linestyle='--', label=f'bound {bound}')
        axis.legend()
    save_figure(figure, file)


def report_sweep(runs: Sequence[Run], bound: int, folder: str | Path) -> dict[str, Any]:
    """Rows, comparisons, the text of both, and `sweep.png`, `sweep.json` in the folder."""
    rows, comparisons = summarize(runs), compare(runs, bound)
    result = {'rows': rows, 'comparisons': comparisons, 'text': format_sweep(rows, comparisons, bound)}
    plot_sweep(runs, bound, Path(folder) / 'sweep.png')
    with atomic_file(Path(folder) / 'sweep.json') as temporary:
        temporary.write_text(json.dumps({'bound': bound, **result}, indent=1))
    return result


def check_sweep(seeds: int = 1, depths: Sequence[int] | None = None) -> None:
    """Raise a LeanError unless seeds and depths are whole numbers of at least 1."""
    for name, value in (('seeds', seeds), *(('depths', depth) for depth in depths or ())):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10_000:
            raise LeanError(f'{name} must be a whole number from 1 to 10,000, got {value!r}.')


def verify_bound(
        bound: int,
        *,
        img_size: int,
        num_classes: int,
        family: str = 'resnet',
        budget: str | None = None,
        depths: Sequence[int] | None = None,
        seeds: int = 3,
        output: str = 'output/depth',
        **training: Any,
) -> dict[str, Any]:
    """Run a sweep around a bound and report it.

    Args:
        bound: The depth bound that is checked.
        img_size: Side of the images in pixels.
        num_classes: Number of classes.
        family: See `Sweep`, as `budget` and `output`.
        depths: Depths to train; from a quarter of the bound to three times if None.
        seeds: How often each depth is trained.
        **training: Settings of `TrainConfig` over `SWEEP_TRAINING`.

    Raises:
        LeanError: Settings that cannot be met; nothing has been written then.
    """
    check_family(family)
    check_sweep(seeds, depths)
    settings = {**SWEEP_TRAINING, **training}
    settings.setdefault('warmup_epochs', min(1, settings['epochs'] - 1))
    config = TrainConfig.from_args({'model': '-', 'img_size': img_size, **settings})
    least = FAMILIES[family].depth((FAMILIES[family].min_blocks,))
    sweep = Sweep(
        bound, depths or default_depths(bound, least), range(seeds), family, budget, num_classes, config, output)
    return report_sweep(run_sweep(sweep), bound, sweep.output)
