"""The queue of experiments and the page made from its rows: `tools/experiments.py`."""
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_lean import LeanError

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / 'tools'


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import experiments_queue
    yield experiments_queue
    for name in ('experiments_queue', 'experiments_report'):
        sys.modules.pop(name, None)


@pytest.fixture
def report(tools):
    import experiments_report
    return experiments_report


def test_channels_are_compared_at_equal_sizes(tools):
    """Those chosen by images with those of Torch-Pruning: of each layer the same share, or as many parameters."""
    import experiments_compress as lab
    torch.manual_seed(0)
    model = timm.create_model('lean_resnet', layers=(1, 1), widths=(16, 32), num_classes=10).eval()
    images = [torch.randn(32, 3, 16, 16)]
    count = lab.count_params

    def left(technique, size):
        return count(lab.compress(model, technique, size, images, images[0]))

    assert left('channels-by-images', 0.25) == left('torch-pruning-cut', 0.25) < count(model)
    assert left('channels-together', 0.5) == pytest.approx(0.5 * count(model), rel=0.03)
    assert left('torch-pruning', 0.5) == pytest.approx(0.5 * count(model), rel=0.03)
    with pytest.raises(LeanError, match='needs --calibrate N'):
        lab.compress(model, 'channels-by-images', 0.25, None, images[0])


def write_queue(folder, text):
    path = folder / 'queue.yaml'
    path.write_text(text)
    return path


def row(name, seed, top1, question=1, **more):
    return {'question': question, 'name': name, 'seed': seed, 'top1': top1, 'params': 1000, 'macs': 2_000_000,
            'bytes': 4000, 'epochs': 3, 'seconds': 1., 'settings': {}, 'data': 'PNG', 'hardware': 'a machine',
            'date': '2026-01-02', 'command': 'python x', 'commit': 'abc', 'versions': {}, **more}


def write_rows(folder, rows):
    folder.mkdir(exist_ok=True)
    for each in rows:
        with open(folder / f'q{each["question"]}.jsonl', 'a') as f:
            f.write(json.dumps(each) + '\n')


class TestQueueFile:
    def test_every_combination_and_seed_is_a_run(self, tools, tmp_path):
        runs = tools.read_queue(write_queue(tmp_path, '''
            define:
              base: timm-lean train --seed {seed} --output {run} --model-args rank={rank}
            runs:
            - {question: 2, name: later, seeds: [0], command: 'python x.py {runs}/q1/a-8/seed{seed}/f {data}'}
            - {question: 1, name: 'a {rank}', each: {rank: [8, 16]}, seeds: [0, 1], command: '{base} --epochs 1'}
        '''))
        assert [run.label for run in runs] == [
            'q1/a-8/seed0', 'q1/a-16/seed0', 'q1/a-8/seed1', 'q1/a-16/seed1', 'q2/later/seed0']
        assert runs[1].settings == {'rank': 16}
        assert runs[2].command('my runs') == (
            "timm-lean train --seed 1 --output 'my runs/q1/a-8/seed1' --model-args rank=8 --epochs 1")
        assert runs[4].command() == 'python x.py RUNS/q1/a-8/seed0/f DATA'

    @pytest.mark.parametrize('text, message', [
        ('nothing', 'must hold a list'),
        ('runs: [', 'cannot be read'),
        ('runs: [{question: 1, name: a, seeds: [0]}]', 'needs command, name, question, seeds'),
        ('runs: [{question: 1, name: a, seeds: [0], command: python, colour: red}]', 'needs command'),
        ('runs: [{question: 1, name: a, seeds: [0], command: "python {nothing}"}]', "'nothing' is not one of"),
        ('runs: [{question: 1, name: a, seeds: [0, 0], command: python}]', "two runs 'q1/a/seed0'"),
    ])
    def test_what_is_wrong_is_said_in_one_line(self, tools, tmp_path, text, message):
        with pytest.raises(LeanError, match=message):
            tools.read_queue(write_queue(tmp_path, text))

    def test_only_keeps_the_order_of_its_patterns(self, tools):
        runs = [tools.Run(1, name, seed, 'python') for seed in (0, 1) for name in 'ab']
        assert [r.label for r in tools.choose(runs, ['*/b/*', '*/seed1'])] == [
            'q1/b/seed0', 'q1/b/seed1', 'q1/a/seed1']
        with pytest.raises(LeanError, match='matches no run'):
            tools.choose(runs, ['q9/*'])

    def test_a_run_says_which_images_it_needs(self, tools):
        runs = [tools.Run(1, 'a', 0, f'python x.py {{run}}{images}') for images in ('', ' {data}', ' {bccd}')]
        assert [run.needs for run in runs] == [None, 'data', 'bccd']
        assert runs[2].command('RUNS', 'cifar', 'blood cells') == "python x.py RUNS/q1/a/seed0 'blood cells'"

    def test_the_shipped_queue_is_valid(self, tools):
        runs = tools.read_queue(TOOLS / 'experiments.yaml')
        assert {run.needs for run in runs if run.question == 8} == {'bccd'}
        first = [run for run in runs if run.question == 1]
        assert len(first) == 18 and {run.seed for run in first} == {0, 1, 2}


class TestWork:
    SCRIPT = '''
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
tries = folder / 'tries'
tries.write_text(tries.read_text() + 'x' if tries.exists() else 'x')
if 'fail' in sys.argv and len(tries.read_text()) < 2:
    sys.exit(3)
(folder / 'result.json').write_text(json.dumps({'top1': 50.5, 'params': 1, 'macs': 2, 'bytes': 3, 'seconds': 4}))
'''

    def queue(self, tools, folder, *runs):
        (folder / 'script.py').write_text(self.SCRIPT)
        command = f'python {folder / "script.py"} {{run}} '
        return tools.Queue([tools.Run(1, name, 0, (command + arguments).strip()) for name, arguments in runs],
                           folder / 'runs', folder / 'results')

    def test_a_run_becomes_one_row_and_is_not_repeated(self, tools, tmp_path):
        queue, said = self.queue(tools, tmp_path, ('a', '')), []
        for _ in range(2):
            assert queue.work(nice=0, say=said.append) == 0
        made, = tools.read_rows(tmp_path / 'results' / 'q1.jsonl')
        assert (made['question'], made['name'], made['seed'], made['top1'], made['bytes']) == (1, 'a', 0, 50.5, 3)
        assert made['command'].endswith('script.py RUNS/q1/a/seed0') and made['data'] == 'digits'
        assert made.keys() >= {'params', 'macs', 'seconds', 'commit', 'versions', 'hardware', 'settings', 'date'}
        assert (tmp_path / 'runs/q1/a/seed0/tries').read_text() == 'x'
        assert said[-1] == 'q1/a/seed0: 50.50 %' and 'q1/a/seed0' in queue.status() and '50.50 %' in queue.status()

    def test_a_failure_stops_nothing_and_is_tried_again(self, tools, tmp_path):
        queue = self.queue(tools, tmp_path, ('bad', 'fail'), ('good', ''))
        assert queue.work(nice=0, say=lambda line: None) == 1
        assert [r['name'] for r in tools.read_rows(tmp_path / 'results' / 'q1.jsonl')] == ['good']
        assert queue.work(nice=0, say=lambda line: None) == 0
        assert [r['name'] for r in tools.read_rows(tmp_path / 'results' / 'q1.jsonl')] == ['good', 'bad']

    def test_what_another_process_runs_comes_last(self, tools, tmp_path):
        queue = self.queue(tools, tmp_path, ('held', ''), ('free', ''))
        (tmp_path / 'runs/q1/held/seed0').mkdir(parents=True)
        lock = os.open(tmp_path / 'runs/q1/held/seed0/.lock', os.O_CREAT | os.O_WRONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert 'running' in queue.status().splitlines()[0] and 'to do' in queue.status().splitlines()[1]

        def release():
            while not tools.read_rows(tmp_path / 'results' / 'q1.jsonl'):
                time.sleep(0.05)
            os.close(lock)
        thread = threading.Thread(target=release)
        thread.start()
        assert queue.work(nice=0, say=lambda line: None) == 0
        thread.join()
        assert [r['name'] for r in tools.read_rows(tmp_path / 'results' / 'q1.jsonl')] == ['free', 'held']

    def test_other_programs_are_refused(self, tools, tmp_path):
        queue = tools.Queue([tools.Run(1, 'a', 0, 'rm {run}')], tmp_path, tmp_path)
        with pytest.raises(LeanError, match="starts with timm-lean or python, got 'rm'"):
            queue.work()

    @pytest.mark.parametrize('line, message', [('{"question": 1', 'line 2 is not a row'), ('{}', 'has no name, '),
                                               ('3', 'line 2 is not a row')])
    def test_a_damaged_line_is_named(self, tools, tmp_path, line, message):
        write_rows(tmp_path, [row('a', 0, 1.)])
        with open(tmp_path / 'q1.jsonl', 'a') as f:
            f.write(line + '\n')
        with pytest.raises(LeanError, match=message):
            tools.read_rows(tmp_path / 'q1.jsonl')


@pytest.mark.slow
def test_a_training_on_the_digits_goes_on_after_the_queue_was_stopped(tools, tmp_path):
    path = write_queue(tmp_path, '''
        runs:
        - question: 1
          name: tiny
          seeds: [3]
          command: timm-lean train --model resnet20_cifar --img-size 8 --data digits --train-images 100 --batch-size 50
            --epochs 4 --cache --seed {seed} --output {run} --resume
    ''')
    folder = tmp_path / 'runs' / 'q1' / 'tiny' / 'seed3'
    command = [sys.executable, str(TOOLS / 'experiments.py'), 'run', str(path), '--runs', str(tmp_path / 'runs'),
               '--results', str(tmp_path / 'results'), '--nice', '0']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        while not (folder / 'resume.pt').exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 143
    assert not (tmp_path / 'results').exists()
    queue = tools.Queue(tools.read_queue(path), tmp_path / 'runs', tmp_path / 'results')
    assert 'to do, ' in queue.status()  # nobody holds it: the training was stopped too
    assert queue.work(nice=0, say=lambda line: None) == 0
    made, = tools.read_rows(tmp_path / 'results' / 'q1.jsonl')
    assert 'Resuming' in (folder / 'log.txt').read_text()
    assert (made['seed'], made['epochs'], made['params']) == (3, 4, 269_722)  # the published 0.27 M
    assert made['bytes'] == (folder / 'last.safetensors').stat().st_size and made['seconds'] > 0
    assert 0 <= made['top1'] <= 100


class TestImages:
    @pytest.mark.parametrize('quality, sampling, expected', [
        (75, 2, 'JPEG, quality 75, chroma halved'), (92, 0, 'JPEG, quality 92'),
        (30, 2, 'JPEG, quality 30, chroma halved')])
    def test_jpegs_tell_their_quality(self, tools, tmp_path, quality, sampling, expected):
        (tmp_path / 'train' / 'cat').mkdir(parents=True)
        Image.new('RGB', (32, 32)).save(tmp_path / 'train' / 'cat' / '0.jpg', quality=quality, subsampling=sampling)
        assert tools.describe_images(tmp_path) == expected

    def test_torchvisions_cifar10_becomes_a_folder_of_pngs(self, tools, tmp_path, monkeypatch):
        import torchvision.datasets.cifar as cifar
        monkeypatch.setattr(cifar, 'check_integrity', lambda *args: True)  # it knows the real files only
        batches, names = tmp_path / 'cifar-10-batches-py', ['cat', 'dog']
        batches.mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (6, 3072), dtype=np.uint8)
        for number, name in enumerate([*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch']):
            with open(batches / name, 'wb') as f:
                pickle.dump({'data': pixels[number:number + 1], 'labels': [number % 2]}, f)
        with open(batches / 'batches.meta', 'wb') as f:
            pickle.dump({'label_names': names}, f)
        folder = tools.image_folder(tmp_path, tmp_path / 'runs')
        assert len(list(folder.glob('train/*/*.png'))) == 5 and tools.describe_images(folder) == 'PNG'
        with Image.open(folder / 'test' / 'dog' / '00000.png') as image:  # rows of red, then green, then blue
            assert (np.asarray(image).transpose(2, 0, 1).reshape(-1) == pixels[5]).all()
        assert tools.image_folder(folder, tmp_path) == folder

    def test_a_folder_without_images_is_refused(self, tools, tmp_path):
        with pytest.raises(LeanError, match='holds no images'):
            tools.describe_images(tmp_path)


class TestPage:
    def test_a_paired_effect_worked_out_by_hand(self, report):
        base = [row('a', seed, top1) for seed, top1 in enumerate((79., 80., 81.))]
        ours = [row('b', seed, top1) for seed, top1 in enumerate((80., 82., 84., 99.))]  # seed 3 has no partner
        effect = report.paired(ours, base)
        # differences 1, 2, 3: t = 2 sqrt(3), two degrees of freedom; their 97.5 % quantile is 4.30265
        assert effect.mean == 2 and effect.seeds == 3
        assert effect.p == pytest.approx(0.07418, abs=1e-5)
        assert (effect.low, effect.high) == pytest.approx((2 - 4.30265 / 3 ** 0.5, 2 + 4.30265 / 3 ** 0.5), abs=1e-4)
        assert str(report.paired(ours[:1], base)) == '+1.00 points (one seed)'
        assert report.paired(ours[3:], base) is None

    def test_the_page_holds_the_answer_the_tables_and_what_is_missing(self, tools, report, tmp_path):
        results, page = tmp_path / 'results', tmp_path / 'results.md'
        write_rows(results, [
            *(row('dense', seed, top1) for seed, top1 in enumerate((79., 80., 81.))),
            *(row('small', seed, top1, params=500) for seed, top1 in enumerate((80., 82., 84.))),
            *(row(f'deeper, {name}', 0, top1) for name, top1 in (('dense', 90.), ('small', 89.))),
            *(row('dense', seed, top1, question=2) for seed, top1 in enumerate((85., 86., 87.))),
            *(row(f'{technique} 0.5 {after}', seed, top1 - loss * seed, question=2,
                  settings={'technique': technique, 'size': 0.5})
              for technique, loss in (('share', 0), ('torch-pruning', 1)) for seed in range(3)
              for after, top1 in (('plain', 70.), ('calibrated', 84.5)))])
        (results / 'earlier.md').write_text('## Before\n')
        queue = [tools.Run(1, 'dense', seed, 'python') for seed in range(5)]
        for _ in range(2):
            report.write_page(queue, results, page)
        text = page.read_text()
        assert '**small** against dense: +2.00 points [-0.48, +4.48], p = 0.074, with -50 % parameters.' in text
        assert '**deeper, small** against deeper, dense: -1.00 points (one seed), with +0 % parameters.' in text
        assert '| dense | 1,000 | 2.00 M | 4.0 kB | 3 | 80.00 ± 1.00 (3) |  |' in text
        assert '**share**, points: at 0.5 -1.5 calibrated.' in text  # -0.5, -1.5 and -2.5
        assert '| torch-pruning | 0.5 | 1,000 | 2.00 M | 4.0 kB | 69.00 ± 1.00 (3) | 83.50 ± 1.00 (3) |' in text
        # differences 0, 1, 2: the same t as above, over half the mean
        effect = '+1.00 points [-1.48, +3.48], p = 0.23'
        assert f'| share against torch-pruning | 0.5 | {effect} | {effect} |  |  |' in text
        assert '- 1: 3 of 5 runs are finished.' in text and '- 3: Which kernels' in text and 'lossy' not in text
        assert text.index('## Before') > text.index('## 2.')
        for picture in ('q1.png', 'q2.png'):
            with Image.open(results / picture) as image:
                assert image.size[0] > 300
            assert f'(results/{picture})' in text

    def test_no_rows_no_page(self, report, tmp_path):
        with pytest.raises(LeanError, match='holds no rows'):
            report.write_page([], tmp_path, tmp_path / 'results.md')

    def test_the_page_of_the_repository_is_what_its_rows_give(self, tools, report, tmp_path):
        results = ROOT / 'docs' / 'results'
        for file in (*results.glob('*.jsonl'), results / 'earlier.md'):
            (tmp_path / 'results').mkdir(exist_ok=True)
            (tmp_path / 'results' / file.name).write_text(file.read_text())
        page = tmp_path / 'results.md'
        report.write_page(tools.read_queue(TOOLS / 'experiments.yaml'), tmp_path / 'results', page)
        assert (ROOT / 'docs' / 'results.md').read_text() == page.read_text(), (
            'run: python tools/experiments.py report')
