"""`tools/benchmark.py all`: its table, really measured, takes the place of the earlier one and of nothing else."""
import re
import sys
from pathlib import Path

import pytest
import torch

from timm_lean import LeanError

TOOLS = Path(__file__).parents[1] / 'tools'
MARKS = '<!-- benchmark all, {0} -->\n{1}<!-- end of benchmark all, {0} -->'


@pytest.fixture
def bench_all(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import bench_all
    yield bench_all
    for name in ('bench_all', 'bench_criteria', 'bench_entropy', 'bench_shared', 'timing'):
        sys.modules.pop(name, None)


def test_a_measured_table_replaces_only_its_own(bench_all, tmp_path, monkeypatch):
    """The cheapest part, measured: the criteria of kernels, fewer than those of ResNet-18."""
    page = tmp_path / 'page.md'
    page.write_text('\n'.join(
        ['before', MARKS.format('cpu', 'old\n'), 'between', MARKS.format('cuda', 'gpu\n'), 'after\n']))
    monkeypatch.setattr('timm.create_model', lambda name: torch.nn.Conv2d(64, 64, 3))
    for _ in range(2):  # the second run finds the first one's table
        assert bench_all.main(['--device', 'cpu', '--only', 'criteria', '--repeats', '2', '--write', str(page)]) == 0
        text = page.read_text()
        assert text.startswith('before\n') and text.endswith('after\n') and 'between' in text and 'gpu' in text
        rows = re.findall(r'^\| eight criteria .* \| batched torch.linalg \| ([\d.]+) \| ([\d.]+) - ([\d.]+) \|$', text,
                          re.MULTILINE)
        assert 'old' not in text and len(rows) == 1
        median, low, high = map(float, rows[0])
        assert 0 < low <= median <= high < 1, 'the closed forms are faster than eigenvalues'


def test_a_page_without_the_marks_is_refused_before_measuring(bench_all, tmp_path, monkeypatch):
    (tmp_path / 'page.md').write_text('nothing')
    monkeypatch.setattr(bench_all, 'PARTS', {'one': lambda args, x: pytest.fail('measured')})
    with pytest.raises(LeanError, match='benchmark all, cpu'):
        bench_all.main(['--device', 'cpu', '--write', str(tmp_path / 'page.md')])
    assert (tmp_path / 'page.md').read_text() == 'nothing'
