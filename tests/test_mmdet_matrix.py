"""Every technique with a dozen detectors of MMDetection's own configs (slow): `tools/detector_matrix.py`."""
import importlib.util

import pytest
import torch
from mmdet_support import TOOLS

spec = importlib.util.spec_from_file_location('detector_matrix', TOOLS / 'detector_matrix.py')
matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)


@pytest.mark.slow
@pytest.mark.parametrize('name', matrix.DETECTORS)
def test_every_technique_works_or_says_why_not(name):
    """A crash, a file that does not give tensors and outputs back, or a loss that is not finite fails."""
    cells = dict(matrix.try_detector(name))
    assert set(cells) == set(matrix.TECHNIQUES)
    refused = {technique for technique, cell in cells.items() if cell.startswith('refused: ')}
    assert refused == ({'blocks'} if name == 'ssd300' else set()), cells
    assert all(float(cells[technique].removeprefix('works, ')) < 1 for technique in {'share', 'channels'}), cells


def test_no_weight_is_what_memory_held(monkeypatch):
    """SSD's scales have no value until its weights are initialized: to 20, says its paper."""
    from mmdet.models.necks.ssd_neck import L2Norm
    made = L2Norm.__init__

    def poisoned(self, *args, **options):
        made(self, *args, **options)
        torch.nn.init.constant_(self.weight, float('nan'))

    monkeypatch.setattr(L2Norm, '__init__', poisoned)
    assert (matrix.new_detector(matrix.DETECTORS['ssd300']).neck.l2_norm.weight == 20).all()


def test_the_table_numbers_its_reasons():
    rows = {'a': {'kernels': 'works', 'share': 'refused: x'}, 'b': {'kernels': 'refused: y', 'share': 'refused: x'}}
    assert matrix.format_rows(rows).splitlines() == [
        '| | kernels | share |', '|---|---|---|',
        '| a | works | refused [1] |', '| b | refused [2] | refused [1] |', '', '[1] refused: x', '[2] refused: y']


def test_it_goes_on_where_it_was_and_tries_again_what_crashed(tmp_path, monkeypatch, capsys):
    tried = []

    def try_detector(name, techniques, stop):
        tried.append((name, *techniques))
        for technique in techniques:
            yield technique, f'{matrix.CRASHED}OSError' if len(tried) == 1 and technique == 'share' else 'works'

    monkeypatch.setattr(matrix, 'try_detector', try_detector)
    page, rows = tmp_path / 'page.md', str(tmp_path / 'rows.jsonl')
    page.write_text('before\n<!-- detector matrix -->\nold\n<!-- end of detector matrix -->\nafter\n')
    arguments = ['ssd300', '--only', 'kernels,share', '-o', rows, '--write', str(page)]
    assert matrix.main(arguments) == 1 and matrix.main(arguments) == 0
    assert tried == [('ssd300', 'kernels', 'share'), ('ssd300', 'share')]
    assert page.read_text() == ('before\n<!-- detector matrix -->\n| | kernels | share |\n|---|---|---|\n'
                                '| ssd300 | works | works |\n\n<!-- end of detector matrix -->\nafter\n')
