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
    for name in ('prove_gpu', 'gpu_page', 'bench_all', 'bench_criteria', 'bench_entropy', 'bench_shared', 'timing'):
        sys.modules.pop(name, None)


@pytest.fixture
def argv(tmp_path):
    return ['--part', 'tests', '--device', 'cpu', '--results', str(tmp_path / 'r' / 'cpu.jsonl'), '--quick',
            '--runs', str(tmp_path / 'runs')]


def rows_of(argv):
    return [json.loads(line) for line in Path(argv[5]).read_text().splitlines()]


def test_a_part_goes_on_where_it_stopped(prove_gpu, argv, tmp_path, monkeypatch, capfd):
    """The first step is not run twice; one that fails or is cut off stops the part and is run again."""
    marks = tmp_path / 'marks'
    second = 'raise SystemExit(3)'

    def steps(args):
        return {'first': prove_gpu.Step(['-c', f'open({str(marks)!r}, "a").write("x")']),
                'second': prove_gpu.Step(['-c', second], resumes=True)}

    monkeypatch.setitem(prove_gpu.PARTS, 'tests', steps)
    assert prove_gpu.main(argv) == 1
    second = 'import time; time.sleep(60)'
    assert prove_gpu.main([*argv, '--limit', '1']) == 1 and 'goes on from here' in capfd.readouterr().out
    second = f'print("fine", {str(tmp_path / "runs")!r})'
    assert prove_gpu.main(argv) == prove_gpu.main(argv) == 0
    assert marks.read_text() == 'x'
    rows = rows_of(argv)
    assert [(row['step'], row['ok']) for row in rows] == [('first', True), ('second', False), ('second', True)]
    assert rows[-1]['output'] == 'fine RUNS\n' and rows[-1]['hardware']


def test_a_step_that_needs_too_long_is_left_out_until_it_gets_more(prove_gpu, argv, monkeypatch, capfd):
    """With all the processes that it has started."""
    step = '''
import subprocess, sys, time
subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])  # holds the output open
time.sleep(60)
'''
    monkeypatch.setitem(prove_gpu.PARTS, 'tests', lambda args: {
        'long': prove_gpu.Step(['-c', step]), 'short': prove_gpu.Step(['-c', 'print("fine")'])})
    argv += ['--limit', '2']
    assert prove_gpu.main(argv) == 1 and 'cut off after 2' in capfd.readouterr().out
    assert prove_gpu.main(argv) == 1 and 'give it more by --limit' in capfd.readouterr().out
    assert [(row['step'], row['ok']) for row in rows_of(argv)] == [('long', False), ('short', True)]
    step = 'pass'
    argv[-1] = '60'
    assert prove_gpu.main(argv) == 0


def test_tables_and_limits(prove_gpu, tmp_path):
    import gpu_page

    def row(step, *ratios):
        return {'part': 'benchmarks', 'step': step, 'date': '2026-01-02', 'seconds': 1., 'output': '', 'rows': [
            dict(zip(('what', 'anchor', 'median', 'setting', 'macs'), ratio, strict=True), low=0.5, high=2.)
            for ratio in ratios]}

    half, whole = 'inference of resnet50 with 50 % of its MACs, batch 1', 'inference of resnet50, batch 1'
    shared = 'inference of resnet34_s32u1'
    rows = [
        row('a', (half, whole, 0.62, 'fp32', 0.5), (f'{shared}, folded', 'inference of resnet34', 1.01, 'fp32', None)),
        row('b', (half, whole, 0.63, 'bf16', 0.5), (shared, 'inference of resnet34', 3., 'bf16', None)),
        {**row('c'), 'rows': [{'form': 'closed', 'vs': {'closed': 1.}}, {'form': 'eigvals', 'vs': {'closed': 200.}}]},
        {**row('d'), 'part': 'cifar', 'output': 'best top-1 12.3\n'}]
    found = {(text, setting): (ratio, limit) for text, setting, ratio, limit in gpu_page.verdicts(rows) if ratio}
    assert found == {
        ('a shared network, folded, against the dense one', 'fp32'): (1.01, 1.),
        ('ResNet-50 with half its MACs against the whole, batch 1', 'fp32'): (0.62, 0.625),
        ('ResNet-50 with half its MACs against the whole, batch 1', 'bf16'): (0.63, 0.625),
        ('eight criteria against torch.linalg.eigvals alone', 'fp32'): (1 / 200, 0.01)}
    page = tmp_path / 'page.md'
    page.write_text('before\n<!-- benchmark all, cuda -->\nearlier\n<!-- end of benchmark all, cuda -->\nafter\n')
    gpu_page.write_page(page, 'cuda', rows, 'a GPU')
    text = page.read_text()
    assert text.startswith('before\n') and text.endswith('after\n') and 'earlier' not in text
    assert f'| {half} | {whole} | 0.620 (0.500 - 2.000) | 0.630 (0.500 - 2.000) |' in text
    assert '| a shared network, folded, against the dense one | fp32 | 1.01 | 1 | MISSED |' in text
    assert 'batch 1 | fp32 | 0.62 | 0.625 | met |' in text and 'batch 1 | bf16 | 0.63 | 0.625 | MISSED |' in text
    assert 'batch 32 | | | | not measured |' in text and 'best top-1 12.3' in text and '2026-01-02, a GPU' in text


def test_full_parts_need_the_data(prove_gpu, tmp_path, capsys):
    argv = ['--device', 'cpu', '--results', str(tmp_path / 'cpu.jsonl')]
    assert prove_gpu.main(argv) == 2 and '--data-dir' in capsys.readouterr().err
    assert not (tmp_path / 'cpu.jsonl').exists()


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize('part', ['tests', 'benchmarks', 'calibration', 'detector', 'cifar', 'eigenvalues'])
def test_every_command_works(part, argv, tmp_path):
    page = tmp_path / 'page.md'
    page.write_text('<!-- benchmark all, cpu -->\n<!-- end of benchmark all, cpu -->\n')
    argv[1] = part
    for _ in range(4):  # on a slow machine a part takes more than its time
        done = subprocess.run([sys.executable, str(TOOLS / 'prove_gpu.py'), *argv, '--page', str(page)],
                              capture_output=True, text=True)
        if 'goes on from here' not in done.stdout:
            break
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    rows = rows_of(argv)
    assert all(row['ok'] and str(tmp_path) not in json.dumps(row) for row in rows)
    text = page.read_text()
    if part == 'benchmarks':
        assert all(f'| {row["what"]} | {row["anchor"]} |' in text
                   for step in rows for row in step['rows'] if 'what' in row)
        assert 'compiled by aot_eager' in text and 'not measured' in text, 'torch.linalg.eigvals alone: on GPUs only'
    else:
        assert text.count('```text') == len(rows)
