"""The picture of accuracy against cost: the front by its definition, the file, accuracy as `validate` measures it."""
import json

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import timm_lean_cli
from timm_lean import LeanError, save_model
from timm_lean.measure import ModelReport
from timm_lean.measure.tradeoff import pareto_front, plot_tradeoff


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tradeoff')
    paths = []
    for rank in (None, 4, 8):
        torch.manual_seed(rank or 0)
        kwargs = {} if rank is None else dict(shared_rank=rank, unique_rank=1)
        paths.append(folder / f'{rank or "dense"}.safetensors')
        save_model(timm.create_model('resnet20_cifar', layers=(2, 2, 2), num_classes=10, **kwargs), paths[-1])
    return [str(p) for p in paths]


def run(capsys, *args):
    code = timm_lean_cli.main([str(a) for a in args])
    return code, *capsys.readouterr()


def reports():
    return [ModelReport('a', 1000, 5_000_000, 4000, 32, top1=90.), ModelReport('b', 250, 900_000, 1000, 32, top1=85.)]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8))
def test_front_is_what_no_point_beats(points):
    beaten = {i for i, (c, a) in enumerate(points)
              if any(d <= c and b >= a and (d, b) != (c, a) for d, b in points)}
    front = pareto_front(points)
    assert {points[i] for i in front} == {points[i] for i in range(len(points)) if i not in beaten}
    assert len({points[i] for i in front}) == len(front), 'equal points appear once'
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


@pytest.mark.slow
def test_info_shows_the_accuracy_that_validate_measures_and_draws(capsys, checkpoints, tmp_path):
    first, *others = checkpoints
    vs = [a for other in others for a in ('--vs', other)]
    code, out, err = run(capsys, 'info', first, *vs, '--plot', tmp_path / 'a.png', '--img-size', 16, '--json',
                         '--device', 'cpu')
    assert code == 0, err
    assert Image.open(tmp_path / 'a.png').size > (600, 400)
    assert [p.name for p in tmp_path.iterdir()] == ['a.png']
    for source, report in zip(checkpoints, json.loads(out), strict=True):
        assert report['name'] == source and report['latency_ms'] is None
        _, validated, _ = run(capsys, 'validate', source, '--img-size', 16, '--json', '--device', 'cpu')
        assert report['top1'] == json.loads(validated)['top1']


def test_info_adds_accuracy_to_the_table_without_a_picture(capsys, checkpoints):
    code, out, _ = run(capsys, 'info', checkpoints[0], '--data', 'digits', '--img-size', 8, '--device', 'cpu')
    assert code == 0
    assert out.splitlines()[0].endswith('top-1') and out.splitlines()[1].endswith(' %')


def test_axes_say_what_was_measured(tmp_path):
    plot_tradeoff(reports(), tmp_path / 'macs.svg')
    timed = reports()
    for report, ms in zip(timed, (3., 2.), strict=True):
        report.latency_ms, report.device = ms, 'cpu'
    plot_tradeoff(timed, tmp_path / 'ms.svg')
    macs, ms = ((tmp_path / name).read_text() for name in ('macs.svg', 'ms.svg'))
    assert '<!-- multiply-accumulates at 32 px -->' in macs and '<!-- milliseconds per image, batch 1 on cpu -->' in ms
    assert all('<!-- top-1 accuracy (%) -->' in text and '1.00 k parameters' in text for text in (macs, ms))


@pytest.mark.parametrize('name, words', [('a.xyz', r'a\.xyz.*\.png'), ('a', r'must end in'), ('x.png', 'is a folder')])
def test_a_picture_that_cannot_be_written_is_said_before_measuring(tmp_path, name, words):
    (tmp_path / 'x.png').mkdir()
    with pytest.raises(LeanError, match=words):
        plot_tradeoff(reports(), tmp_path / name)


def test_wrong_names_and_classes_are_one_line(capsys, checkpoints, tmp_path):
    code, _, err = run(capsys, 'info', checkpoints[0], '--plot', '/dev/null/a.png')
    assert code == 2 and err.count('\n') == 1 and '/dev/null' in err
    few = tmp_path / 'few.safetensors'
    save_model(timm.create_model('resnet20_cifar', num_classes=3), few)
    code, _, err = run(capsys, 'info', few, '--plot', tmp_path / 'a.png', '--img-size', 8, '--device', 'cpu')
    assert code == 2 and err.count('\n') == 1 and '3 classes' in err
