"""`timm-lean compress` as a user meets it."""
import json

import pytest
import timm
import torch
from test_cli import run

from timm_lean import load_model, save_model


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('ckpt') / 'model.safetensors'
    torch.manual_seed(0)
    save_model(timm.create_model('lean_resnet', layers=(2, 2), widths=(8, 16), num_classes=10), path)
    return path


DIGITS = ['--data', 'digits', '--img-size', '8', '--workers', '0', '--device', 'cpu', '--calibrate', '16']


def test_the_checkpoint_meets_the_target_and_what_was_tried_lies_beside_it(capsys, tmp_path, checkpoint):
    code, out, err = run(capsys, 'compress', checkpoint, *DIGITS, '--target', 'params=0.7', '--judge', '40',
                         '--techniques', 'share', '-o', tmp_path / 'small.safetensors', '--json')
    assert code == 0, err
    result = json.loads(out)
    before, after = (sum(p.numel() for p in load_model(f).parameters())
                     for f in (checkpoint, tmp_path / 'small.safetensors'))
    assert after <= 0.7 * before and result['report']['params'] == [before, after]
    assert {p.name for p in (tmp_path / 'small.search').iterdir()} == {
        'candidates.jsonl', 'frontier.csv', 'frontier.png'}
    assert set(result['top1']) == {'before', 'after'}


def test_dry_run_writes_nothing(capsys, tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, 'compress', checkpoint, *DIGITS, '--target', 'params=0.7', '--dry-run',
                       '--techniques', 'share', 'kernels', '-o', 'small.safetensors')
    assert code == 0 and 'share: params 0.' in out and 'kernels is left out: it does not change params' in out
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_exit_code_3_and_writes_no_checkpoint(capsys, tmp_path, checkpoint):
    code, _, err = run(capsys, 'compress', checkpoint, *DIGITS, '--target', 'params=0.001', '--techniques', 'share',
                       '-o', tmp_path / 'small.safetensors')
    assert code == 3 and 'out of reach' in err and 'Traceback' not in err
    assert not (tmp_path / 'small.safetensors').exists()


@pytest.mark.parametrize(('arguments', 'words'), [
    (['--target', 'size=0.5'], ["'size'", 'latency']),
    (['--target', 'params=2'], ['params=2', 'needs a unit']),
    (['--target', 'file=5ms'], ['file=5ms', 'kB']),
    (['--target', 'params=0.5', '--target', 'params=0.4'], ['2 times']),
    (['--target', 'params=0.5', '--techniques', 'magic'], ["'magic'"]),
    (['--target', 'params=0.5', '--minutes', '0'], ['minutes', '0']),
    (['--target', 'params=0.5', '--max-drop', 'nan'], ['max_drop', 'nan']),
    (['--target', 'params=0.5', '--calibrate', '0'], ['--calibrate', '0']),
    (['--target', 'params=0.5', '--judge', '0'], ['--judge', '0']),
    ([], ['--target'])], ids=lambda v: ' '.join(v)[:50])
def test_bad_input_is_one_line(capsys, tmp_path, checkpoint, arguments, words):
    given = [a for a in DIGITS if '--calibrate' not in arguments or a not in ('--calibrate', '16')]
    code, _, err = run(capsys, 'compress', checkpoint, *given, *arguments, '-o', tmp_path / 'o.safetensors')
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert all(word in err for word in words)
    assert not (tmp_path / 'o.safetensors').exists()


def test_no_images(capsys, tmp_path, checkpoint):
    code, _, err = run(capsys, 'compress', checkpoint, '--target', 'params=0.5', '-o', tmp_path / 'o.safetensors')
    assert code == 2 and '--data-dir' in err and not list(tmp_path.iterdir())
