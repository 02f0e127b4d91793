"""The notebooks run from top to bottom, and what is committed holds their pictures."""
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / 'docs' / 'notebooks').glob('*.ipynb'))


def pictures(notebook):
    return [o for cell in notebook.cells for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path, tmp_path):
    nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')
    notebook = nbformat.read(path, 4)
    shown = len(pictures(notebook))
    nbclient.NotebookClient(notebook, timeout=900, resources={'metadata': {'path': str(tmp_path)}}).execute()
    assert len(pictures(notebook)) == shown > 0
