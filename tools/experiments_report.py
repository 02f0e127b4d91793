"""docs/results.md from the rows of docs/results/: the answers, one picture per question, the tables, the commands.

Effects are differences between two networks of the same seed, averaged over the seeds that both have, with the 95 %
interval of Student's t and the p of the paired t-test (scipy). Nothing on the page is written by hand, except what
docs/results/earlier.md holds, which is appended.
"""
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments_queue import Run, read_rows
from scipy.stats import ttest_rel

from timm_lean import LeanError
from timm_lean.checkpoint.files import atomic_file
from timm_lean.measure.pictures import COLORS, REFERENCE, new_figure, save_figure
from timm_lean.measure.table import human_bytes, human_count

Rows = Sequence[dict[str, Any]]

QUESTIONS = {
    1: 'Do networks with shared filter bases keep the accuracy, at equal epochs?',
    2: 'What does a trained network keep when it is made smaller?',
    3: 'Which kernels does each criterion prune, by the L1 protocol of the eigenvalue paper?',
    4: 'What is Convolutional Similarity worth, as a regularizer and as an initialization?',
    5: 'Does accuracy stop growing at the depth that the entropy allows?',
    6: 'How small can the file become for an accuracy?',
    7: 'The same as 2 for MobileNetV2 with ImageNet weights, on CIFAR-10 at 96 pixels.',
    8: 'Detection of blood cells (BCCD): dense, shared, compressed.',
}
_ALONE = 'trained on without calibration'
_AFTER = ('plain', 'calibrated', 'trained on', _ALONE)  # how the names of question 2 end
_RIVALS = {  # of equal sizes
    'share': 'torch-pruning', 'channels': 'torch-pruning-cut', 'channels-by-images': 'torch-pruning-cut',
    'channels-together': 'torch-pruning'}
_WAYS = f"""The dense networks of question 1, made smaller at once (plain), repaired with 512 unlabelled training images
(calibrated), then trained for 2 epochs more (trained on), or trained without having been calibrated ({_ALONE}); `none`
shows what those epochs do to a network as it was. Compare techniques within one of these columns only. Accuracy is on
all test images, points are against the dense network of the same seed. Size is the share of the parameters that is left
for `share`, `torch-pruning` and `channels-together`, the share of kernels pruned for `kernels`, of each layer's
channels removed for `channels`, `channels-by-images` and `torch-pruning-cut`, and the number of residual blocks removed
for `blocks`. `channels-by-images` and `channels-together` choose by the 512 images which channels go, of each layer the
same share or of all layers together; the latter is what `compress` does."""
_DETECTION = """RTMDet-tiny (MMDetection's own), trained from scratch for only 12 epochs on 292 images at 320 x 240: far
from what it could learn, and with 72 test images AP moves by points. What counts is what is kept of the first row. Made
smaller at once (plain), repaired with 64 training images without their boxes (calibrated), then trained for 1 epoch
more at a tenth of the learning rate (trained on), which `none` shows for the detector as it was. Size is the share of
the parameters that is left for `share`, of each layer's kernels that is pruned for `kernels`, of each layer's channels
that is removed for `channels`."""
_INTRO = """# Results

What was trained and compressed with this package: networks trained here, compared with each other. Published figures of
the papers are in the pages of the techniques, not here.

"""
_JPEG = """CIFAR-10 was here a copy with lossy images (JPEG, quality 75, chroma halved; each row says what its images
were). Networks reach several points less on it than on the original, so these accuracies do not compare with published
ones; the differences between networks trained on the same images are what counts.

"""
_END = """## Commands

```
python tools/experiments.py run --data-dir CIFAR10    # all runs that have no row yet; stopped, it goes on
python tools/experiments.py run --bccd-dir BCCD       # those of detectors
python tools/experiments.py status
python tools/experiments.py report                    # this page and its pictures, from docs/results/*.jsonl
```

Every row holds the command it came from, where DATA is the folder of the images, BCCD that of the blood cells and RUNS
the folder of the runs.
"""


@dataclass(frozen=True)
class Effect:
    """A difference in top-1 (or AP) between two networks, paired by seed.

    Attributes:
        mean: In points.
        seeds: How many seeds both have.
        low: Lower end of the 95 % interval; None with one seed.
        high: Upper end.
        p: Of the paired t-test.
    """
    mean: float
    seeds: int
    low: float | None = None
    high: float | None = None
    p: float | None = None

    def __str__(self) -> str:
        if self.p is None:
            return f'{self.mean:+.2f} points (one seed)'
        return f'{self.mean:+.2f} points [{self.low:+.2f}, {self.high:+.2f}], p = {self.p:.2g}'


def paired(rows: Rows, base: Rows) -> Effect | None:
    """How much better `rows` are than `base`, over the seeds that both have; None if there are none."""
    ours, theirs = ({row['seed']: score(row) for row in side} for side in (rows, base))
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return None
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    mean = statistics.mean(differences)
    if len(seeds) < 2 or len(set(differences)) < 2:
        return Effect(mean, len(seeds))
    test = ttest_rel([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    low, high = test.confidence_interval(0.95)
    return Effect(mean, len(seeds), float(low), float(high), float(test.pvalue))


def score(row: dict[str, Any]) -> float:
    """Top-1 in per cent, or AP in per cent."""
    return row['top1'] if 'top1' in row else 100 * row['ap']


def by_name(rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Rows of all seeds by name, in the order in which they come."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row['name']].append(row)
    return dict(groups)


def spread(rows: Iterable[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds."""
    values = [score(row) for row in rows]
    if not values:
        return ''
    deviation = f' ± {statistics.stdev(values):.2f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.2f}{deviation} ({len(values)})'


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in (header, ['---'] * len(header), *lines)) + '\n'


def size_cells(row: dict[str, Any]) -> list[str]:
    return [f'{row["params"]:,}', human_count(row['macs']), human_bytes(row['bytes'])]


def networks(question: int, rows: Rows, folder: Path) -> str:
    """The part of a question that compares networks, each with the last dense one before it: answer, picture, table."""
    groups = by_name(rows)
    bases: dict[str, str] = {}
    for name in groups:
        bases[name] = name if name.endswith('dense') or not bases else list(bases.values())[-1]
    effects = {name: paired(group, groups[bases[name]]) for name, group in groups.items() if name != bases[name]}
    change = {name: 100 * (group[0]['params'] / groups[bases[name]][0]['params'] - 1) for name, group in groups.items()}
    answer = [f'**{name}** against {bases[name]}: {effect}, with {change[name]:+.0f} % parameters.'
              for name, effect in effects.items() if effect]
    draw_networks(groups, folder / f'q{question}.png')
    lines = [
        [name, *size_cells(group[0]), str(group[0].get('epochs', '')), spread(group), str(effects.get(name) or '')]
        for name, group in groups.items()]
    return _part(question, answer, folder, table(
        ['network', 'parameters', 'MACs', 'file', 'epochs', '% (seeds)', 'against the dense one, paired'], lines))


def compressions(question: int, rows: Rows, folder: Path) -> str:
    """The part of a question that makes networks smaller in several ways."""
    groups = by_name(rows)
    dense = groups.pop('dense', [])
    ways: dict[tuple[str, float], dict[str, list[dict[str, Any]]]] = defaultdict(dict)
    for name, group in groups.items():
        technique, size = (group[0]['settings'][key] for key in ('technique', 'size'))
        ways[technique, size][name.removeprefix(f'{technique} {size} ')] = group
    answer = [_kept(technique, ways, dense) for technique in dict.fromkeys(t for t, _ in ways) if technique != 'none']
    unit = 'AP, %' if any('ap' in row for row in rows) else '%'
    start = statistics.mean(map(score, dense)) if dense else None
    draw_compressions({way: kinds for way, kinds in ways.items() if way[0] != 'none'}, start,
                      folder / f'q{question}.png', 'AP (%)' if 'AP' in unit else 'top-1 (%)')
    after = [kind for kind in _AFTER if any(kind in kinds for kinds in ways.values())]
    lines = [['dense', '', *(size_cells(dense[0]) if dense else ['', '', '']), spread(dense), *[''] * (len(after) - 1)]]
    for (technique, size), kinds in ways.items():
        first = next(iter(kinds.values()))[0]
        lines.append([technique, f'{size:g}', *size_cells(first), *(spread(kinds.get(kind, [])) for kind in after)])
    accuracies = table(
        ['technique', 'size', 'parameters', 'MACs', 'file', *(f'{kind}, {unit} (seeds)' for kind in after)], lines)
    return _part(question, [*filter(None, answer), _DETECTION if question == 8 else _WAYS], folder,
                 '\n'.join(filter(None, [accuracies, _against_rivals(ways)])))


def _kept(technique: str, ways: dict[tuple[str, float], dict[str, list[dict[str, Any]]]], dense: Rows) -> str:
    """In words: what a technique costs at each size, without any training and trained on."""
    found = []
    for (name, size), kinds in ways.items():
        costs = {kind: paired(kinds.get(kind, []), dense) for kind in ('calibrated', 'trained on')}
        words = [f'{effect.mean:+.1f} {kind}' for kind, effect in costs.items() if effect]
        if name == technique and words:
            found.append(f'at {size:g} {", ".join(words)}')
    return f'**{technique}**, points: {"; ".join(found)}.' if found else ''


def _against_rivals(ways: dict[tuple[str, float], dict[str, list[dict[str, Any]]]]) -> str:
    """Our technique against the rival that gives networks of the same size; empty without both."""
    pairs = [*((kind, kind) for kind in _AFTER[:3]), ('trained on', _ALONE)]
    lines = []
    for (technique, size), kinds in ways.items():
        rival = ways.get((_RIVALS.get(technique, ''), size))
        if rival:
            effects = [paired(kinds.get(ours, []), rival.get(theirs, [])) for ours, theirs in pairs]
            lines.append([f'{technique} against {_RIVALS[technique]}', f'{size:g}', *(str(e or '') for e in effects)])
    return 'Paired by seed, with the 95 % interval and the p of the paired t-test:\n\n' + table(
        ['', 'size', *_AFTER[:3], 'calibrated and trained on against trained on'], lines) if lines else ''


def _part(question: int, answer: Sequence[str], folder: Path, text: str) -> str:
    picture = f'![Accuracy by network, question {question}]({folder.name}/q{question}.png)'
    return '\n\n'.join([f'## {question}. {QUESTIONS[question]}', *answer, picture, text])


def draw_networks(groups: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """A dot for each seed, a bar for the mean, lines joining the networks of one seed."""
    figure, (axes,) = new_figure((max(5., 1.6 * len(groups) + 1), 4))
    names = list(groups)
    for seed in sorted({row['seed'] for group in groups.values() for row in group}):
        points = [(x, score(row)) for x, name in enumerate(names) for row in groups[name] if row['seed'] == seed]
        axes.plot(*zip(*points, strict=True), marker='o', color=COLORS[seed % len(COLORS)], linewidth=0.7,
                  label=f'seed {seed}')
    for x, name in enumerate(names):
        mean = statistics.mean(map(score, groups[name]))
        axes.hlines(mean, x - 0.25, x + 0.25, color=REFERENCE, linewidth=2)
    axes.set_xticks(range(len(names)), [name.replace(', ', ',\n') for name in names])
    axes.set_ylabel('top-1 (%)' if 'top1' in next(iter(groups.values()))[0] else 'AP (%)')
    axes.legend()
    save_figure(figure, path)


def draw_compressions(
        ways: dict[tuple[str, float], dict[str, list[dict[str, Any]]]], start: float | None, path: Path,
        unit: str = 'top-1 (%)') -> None:
    """Accuracy against the size of the file, one panel for each treatment, one line for each technique."""
    treatments = [kind for kind in _AFTER if any(kind in kinds for kinds in ways.values())]
    figure, panels = new_figure((1 + 4 * max(len(treatments), 1), 4), columns=max(len(treatments), 1))
    techniques = list(dict.fromkeys(technique for technique, _ in ways))
    for axes, kind in zip(panels, treatments, strict=False):
        for technique in techniques:
            points = sorted(
                (kinds[kind][0]['bytes'] / 1e3, statistics.mean(map(score, kinds[kind])))
                for (name, _), kinds in ways.items() if name == technique and kind in kinds)
            if points:
                axes.plot(*zip(*points, strict=True), marker='o', label=technique,
                          color=COLORS[techniques.index(technique) % len(COLORS)])
        if start is not None:
            axes.axhline(start, color=REFERENCE, linewidth=1)
        axes.set_title(kind)
        axes.set_xlabel('file (kB)')
    panels[0].set_ylabel(unit)
    if techniques:
        panels[0].legend(fontsize=8)
    save_figure(figure, path)


def unfinished(runs: Sequence[Run], rows: dict[int, Rows]) -> str:
    """What the queue still holds, and what it does not hold yet."""
    lines = []
    for question, title in QUESTIONS.items():
        asked = [run for run in runs if run.question == question]
        done = {(row['name'], row['seed']) for row in rows[question]}
        left = [run for run in asked if (run.name, run.seed) not in done]
        if left:
            lines.append(f'- {question}: {len(asked) - len(left)} of {len(asked)} runs are finished.')
        elif not asked and not done:
            lines.append(f'- {question}: {title} Not run.')
    return '## What is not finished\n\n' + ('\n'.join(lines) or 'Everything in the queue is finished.') + '\n'


def write_page(runs: Sequence[Run], results: Path, output: Path) -> None:
    """Write the page, and the pictures beside the rows.

    Args:
        runs: The queue, to say what is missing.
        results: Folder of the rows.
        output: The page, in the folder that holds `results`.

    Raises:
        LeanError: There are no rows, or files that are no rows.
    """
    order = {run: place for place, run in enumerate(dict.fromkeys((run.question, run.name) for run in runs))}
    rows: dict[int, Rows] = {
        question: sorted(read_rows(results / f'q{question}.jsonl'),
                         key=lambda row: (order.get((row['question'], row['name']), len(order)), row['seed']))
        for question in QUESTIONS}
    if not any(rows.values()):
        raise LeanError(f'{results} holds no rows. Make some: python tools/experiments.py run --data-dir CIFAR10.')
    parts: dict[int, Callable[[int, Rows, Path], str]] = {2: compressions, 7: compressions, 8: compressions}
    text = [parts.get(q, networks)(q, rows[q], results) for q in QUESTIONS if rows[q]]
    everything = [row for part in rows.values() for row in part]
    hardware = sorted({row['hardware'] for row in everything})
    dates = sorted({row['date'] for row in everything})
    seen = f'{len(everything)} rows, {" to ".join(dict.fromkeys([dates[0], dates[-1]]))}, on {"; ".join(hardware)}.\n'
    earlier = results / 'earlier.md'
    jpeg = _JPEG if any(row['data'].startswith('JPEG') for row in everything) else ''
    with atomic_file(output) as temporary:
        temporary.write_text('\n'.join(filter(None, [
            _INTRO + jpeg + seen, *text, unfinished(runs, rows), earlier.read_text() if earlier.is_file() else '',
            _END])))
