"""The GPU tables of docs/benchmarks.md, from the rows that `tools/prove_gpu.py` collects, and the limits they meet.

Of each step the last row that ended well counts.
"""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench_all import split_page

from timm_lean.checkpoint.files import atomic_file

Row = dict[str, Any]


class Limit(NamedTuple):
    """What a time ratio, `form / anchor`, may be at most."""
    text: str
    form: str  # how the form's name begins
    anchor: str
    ratio: float
    ending: str = ''  # how the form's name ends
    of_macs: bool = False  # the limit is `ratio` times the form's share of MACs


CRITERIA = 'eight criteria of the 3 x 3 kernels of resnet50'
FORMS = {'linalg': 'torch.linalg', 'loop': 'numpy, one by one', 'eigvals': 'torch.linalg.eigvals alone'}
LIMITS = (
    Limit('conv_similarity against a training step of ResNet-50', 'conv_similarity', 'training step of resnet50', 0.03),
    Limit('a shared network, folded, against the dense one', 'inference of resnet34_s32u1', 'inference of resnet34', 1.,
          ending=', folded'),
    Limit('training step of a shared network against the dense one', 'training step of resnet34_s32u1',
          'training step of resnet34', 1.05),
    Limit('ResNet-50 with half its MACs against the whole, batch 1', 'inference of resnet50 with',
          'inference of resnet50, batch 1', 1.25, of_macs=True),
    Limit('ResNet-50 with half its MACs against the whole, batch 32', 'inference of resnet50 with',
          'inference of resnet50, batch 32', 1.25, of_macs=True),
    Limit('ResNet-50 with half its MACs against the whole, batch 256', 'inference of resnet50 with',
          'inference of resnet50, batch 256', 1.25, of_macs=True),
    Limit('eight criteria against torch.linalg.eigvals alone', CRITERIA, 'torch.linalg.eigvals alone', 0.01),
)


def verdicts(rows: Sequence[Row]) -> list[tuple[str, str, float | None, float | None]]:
    """Of each limit and each setting it was measured in: its text, the setting, the ratio and the limit.

    Both are None for what was not measured.
    """
    found = []
    for limit in LIMITS:
        measured = [row for row in _measured(rows) if row['what'].startswith(limit.form)
                    and row['what'].endswith(limit.ending) and row['anchor'] == limit.anchor]
        for row in measured:
            share = row['macs'] if limit.of_macs else 1
            found.append((limit.text, row['setting'], row['median'], limit.ratio * share))
        if not measured:
            found.append((limit.text, '', None, None))
    return found


def format_verdicts(rows: Sequence[Row]) -> str:
    lines = ['| limit | | time ratio | at most | |', '| --- | --- | --- | --- | --- |']
    for text, setting, ratio, limit in verdicts(rows):
        if ratio is None or limit is None:
            lines.append(f'| {text} | | | | not measured |')
        else:
            verdict = 'met' if ratio <= limit else 'MISSED'
            lines.append(f'| {text} | {setting} | {ratio:.3g} | {limit:.3g} | {verdict} |')
    return '\n'.join(lines)


def format_page(rows: Sequence[Row], hardware: str) -> str:
    """Everything between the marks of the page: ratios by setting, limits, and what the other parts printed."""
    table: dict[tuple[str, str], dict[str, str]] = {}
    for row in _measured(rows):
        cell = f'{row["median"]:.3f}' + (f' ({row["low"]:.3f} - {row["high"]:.3f})' if 'low' in row else '')
        table.setdefault((row['what'], row['anchor']), {})[row['setting']] = cell
    settings = list(dict.fromkeys(setting for cells in table.values() for setting in cells))
    parts = [f'{_dates(rows)}, {hardware}, by `python tools/prove_gpu.py`.',
             'Time ratios, with quartiles; below 1 is faster.']
    if table:
        lines = ['| | against | ' + ' | '.join(settings) + ' |', '| --- ' * (2 + len(settings)) + '|']
        lines += [f'| {what} | {anchor} | ' + ' | '.join(cells.get(s, '') for s in settings) + ' |'
                  for (what, anchor), cells in table.items()]
        parts += ['\n'.join(lines), format_verdicts(rows)]
    for row in rows:
        if row['part'] != 'benchmarks':
            printed = '\n'.join(row['output'].strip().splitlines()[-12:])
            head = f'{row["part"]}, {row["step"]}: {row["date"]}, {row["seconds"]:.0f} s'
            parts.append(f'{head}\n\n```text\n{printed}\n```')
    return '\n\n'.join(parts)


def write_page(file: Path, kind: str, rows: Sequence[Row], hardware: str) -> None:
    """Put the tables between the page's marks for this kind of device.

    Raises:
        LeanError: The page does not have the marks.
    """
    before, after = split_page(file, kind)
    with atomic_file(file) as temporary:
        temporary.write_text(f'{before}\n{format_page(rows, hardware)}\n\n{after}')


def _measured(rows: Sequence[Row]) -> list[Row]:
    """The ratios in the rows; those of `benchmark.py criteria` in the form of the others."""
    found: list[Row] = []
    for row in rows:
        for item in row.get('rows') or []:
            if 'form' in item:  # of a table of times: against its first form
                if item['form'] != 'closed':
                    found.append({'what': CRITERIA, 'anchor': FORMS[item['form']], 'setting': 'fp32',
                                  'median': 1 / item['vs']['closed']})
            else:
                found.append(item)
    return found


def _dates(rows: Sequence[Mapping[str, Any]]) -> str:
    dates = sorted({row['date'] for row in rows})
    return dates[0] if len(dates) == 1 else f'{dates[0]} to {dates[-1]}'
