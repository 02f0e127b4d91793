"""The table of `tools/benchmark.py all` takes the place of the earlier one, and of nothing else."""
import sys
from pathlib import Path

import pytest
import torch

from timm_lean import LeanError

TOOLS = Path(__file__).parents[1] / 'tools'


@pytest.fixture
def bench_all(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_all
    yield bench_all
    for name in ('bench_all', 'bench_criteria', 'bench_entropy', 'bench_shared', 'timing'):
        sys.modules.pop(name, None)


def test_the_table_replaces_only_its_own(bench_all, tmp_path, monkeypatch):
    page = tmp_path / 'page.md'
    marks = '<!-- benchmark all, {0} -->\n{1}<!-- end of benchmark all, {0} -->'
    tables = marks.format('cpu', 'old\n'), marks.format('cuda', 'gpu\n')
    page.write_text('\n'.join(['before', tables[0], 'between', tables[1], 'after\n']))
    monkeypatch.setattr(bench_all, 'run', lambda args: [bench_all.Ratio('this', 'that', 0.5, 0.25, 0.75)])
    for _ in range(2):  # the second run finds the first one's table
        assert bench_all.main(['--device', 'cpu', '--write', str(page)]) == 0
        text = page.read_text()
        assert text.startswith('before\n') and text.endswith('after\n') and 'between' in text and 'gpu' in text
        assert 'old' not in text and text.count('| this | that | 0.500 | 0.250 - 0.750 |') == 1


def test_a_page_without_the_marks_is_refused_before_measuring(bench_all, tmp_path, monkeypatch):
    (tmp_path / 'page.md').write_text('nothing')
    monkeypatch.setattr(bench_all, 'run', lambda args: pytest.fail('measured'))
    with pytest.raises(LeanError, match='benchmark all, cpu'):
        bench_all.main(['--device', 'cpu', '--write', str(tmp_path / 'page.md')])
    assert (tmp_path / 'page.md').read_text() == 'nothing'


def test_ratios_are_of_the_same_round(bench_all, monkeypatch):
    from timing import Timing
    timings = [Timing('a', [2., 4., 6.]), Timing('b', [1., 4., 2.])]
    monkeypatch.setattr(bench_all, 'interleave', lambda *args, **kwargs: timings)
    row, = bench_all.ratios({}, [('a', 'b')], 3, torch.device('cpu'))
    assert (row.low, row.median, row.high) == (1.5, 2, 2.5)
