"""tools/prove_gpu.py: it goes on where it stopped, keeps what failed, and its commands work (slow)."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / 'tools'


@pytest.fixture
def prove_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import prove_gpu
    yield prove_gpu
    sys.modules.pop('prove_gpu', None)


def test_a_part_goes_on_where_it_stopped(prove_gpu, tmp_path, monkeypatch, capfd):
    """The first step is not run twice; one that fails or is cut off stops the part and is run again."""
    marks = tmp_path / 'marks'
    second = 'raise SystemExit(3)'

    def commands(args):
        return {'first': ['-c', f'open({str(marks)!r}, "a").write("x")'], 'second': ['-c', second]}

    monkeypatch.setitem(prove_gpu.PARTS, 'tests', commands)
    argv = ['--part', 'tests', '--device', 'cpu', '--results', str(tmp_path / 'r' / 'cpu.jsonl')]
    assert prove_gpu.main(argv) == 1
    monkeypatch.setattr(prove_gpu, 'LIMIT', 1)
    second = 'import time; time.sleep(60)'
    assert prove_gpu.main(argv) == 1 and 'goes on from here' in capfd.readouterr().out
    second = 'print("fine")'
    monkeypatch.setattr(prove_gpu, 'LIMIT', 60)
    assert prove_gpu.main(argv) == prove_gpu.main(argv) == 0
    assert marks.read_text() == 'x'
    rows = [json.loads(line) for line in (tmp_path / 'r' / 'cpu.jsonl').read_text().splitlines()]
    assert [(row['step'], row['ok']) for row in rows] == [('first', True), ('second', False), ('second', True)]
    assert rows[-1]['output'] == 'fine\n' and rows[-1]['hardware']


def test_full_parts_need_the_data(prove_gpu, tmp_path, capsys):
    argv = ['--device', 'cpu', '--results', str(tmp_path / 'cpu.jsonl')]
    assert prove_gpu.main(argv) == 2 and '--data-dir' in capsys.readouterr().err
    assert not (tmp_path / 'cpu.jsonl').exists()


@pytest.mark.slow
@pytest.mark.parametrize('part', ['tests', 'benchmarks', 'calibration', 'detector', 'cifar', 'eigenvalues'])
def test_every_command_works(part, tmp_path):
    done = subprocess.run(
        [sys.executable, str(TOOLS / 'prove_gpu.py'), '--part', part, '--device', 'cpu', '--quick',
         '--results', str(tmp_path / 'cpu.jsonl'), '--runs', str(tmp_path / 'runs')], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
