"""Every technique with a dozen detectors of MMDetection's own configs (slow): `tools/detector_matrix.py`."""
import importlib.util

import pytest
from mmdet_support import TOOLS

spec = importlib.util.spec_from_file_location('detector_matrix', TOOLS / 'detector_matrix.py')
matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)


@pytest.mark.slow
@pytest.mark.parametrize('name', matrix.DETECTORS)
def test_every_technique_works_or_says_why_not(name):
    """A crash, a file that does not give the detector back, or a loss that is not finite fails."""
    cells = matrix.try_detector(name)
    assert set(cells) == set(matrix.TECHNIQUES)
    works = {technique for technique, cell in cells.items() if not cell.startswith('refused: ')}
    assert {'regularizer', 'kernels', 'channels', 'export'} <= works, cells


def test_the_table_numbers_its_reasons():
    rows = {'a': {'kernels': 'works', 'share': 'refused: x'}, 'b': {'kernels': 'refused: y', 'share': 'refused: x'}}
    assert matrix.format_rows(rows).splitlines() == [
        '| | kernels | share |', '|---|---|---|',
        '| a | works | refused [1] |', '| b | refused [2] | refused [1] |', '', '[1] refused: x', '[2] refused: y']
