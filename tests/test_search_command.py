"""`timm-lean compress` as a user meets it."""
import json

import pytest
import timm
import torch
from PIL import Image
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
    assert '1. shared bases with' in out and '2. shared bases with' in out and 'calibrated by 16 images' in out
    assert 'At most 360 evaluation images judge' in out  # all that the digits have
    code, out, _ = run(capsys, 'compress', checkpoint, *DIGITS, '--target', 'params=0.7', '--dry-run', '--judge', '40',
                       '--techniques', 'share', '--max-drop', '1', '--minutes', '3', '--finetune-epochs', '2',
                       '-o', 'small.safetensors', '--json')
    plan = json.loads(out)
    assert code == 0 and (plan['judging_images'], plan['calibration_images'], plan['finetune_epochs']) == (40, 16, 2)
    assert (plan['max_drop'], plan['minutes'], plan['in_reach'], len(plan['networks'])) == (1, 3, True, 2)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_exit_code_3_and_writes_no_checkpoint(capsys, tmp_path, checkpoint):
    code, _, err = run(capsys, 'compress', checkpoint, *DIGITS, '--target', 'params=0.001', '--techniques', 'share',
                       '-o', tmp_path / 'small.safetensors')
    assert code == 3 and 'out of reach' in err and 'Traceback' not in err
    assert not (tmp_path / 'small.safetensors').exists()


def test_the_nearest_is_written_and_the_exit_code_says_that_it_is_not_enough(capsys, tmp_path, checkpoint):
    code, out, err = run(capsys, 'compress', checkpoint, *DIGITS, '--target', 'file=0.001', '--techniques', 'int8',
                         '--judge', '40', '--nearest', '-o', tmp_path / 'small.safetensors', '--json')
    assert code == 3 and not err and json.loads(out)['report']['met'] is False
    assert (tmp_path / 'small.safetensors').stat().st_size < 0.6 * checkpoint.stat().st_size


@pytest.mark.parametrize(('arguments', 'words'), [
    (['--target', 'size=0.5'], ["'size'", 'latency']),
    (['--target', 'params=2'], ['params=2', 'needs a unit']),
    (['--target', 'file=5ms'], ['file=5ms', 'kB']),
    (['--target', 'params=0.5', '--target', 'params=0.4'], ['2 times']),
    (['--target', 'params=0.5', '--techniques', 'magic'], ["'magic'"]),
    (['--target', 'params=0.5', '--minutes', '0'], ['minutes', '0']),
    (['--target', 'params=0.5', '--minutes', '0.0001', '--techniques', 'share'], ['too short', '0 networks']),
    (['--target', 'params=0.5', '--minutes', '-1', '--dry-run'], ['minutes', '-1']),
    (['--target', 'params=0.5', '--max-drop', '-1', '--dry-run'], ['max_drop', '-1']),
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


def write_images(folder, count=16):
    """Images of one brightness each, in no class folder."""
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new('RGB', (8, 8), (15 * i, 255 - 15 * i, 100)).save(folder / f'{i}.png')


UNLABELLED = ['--workers', '0', '--device', 'cpu', '--target', 'params=0.7', '--techniques', 'share']


@pytest.mark.parametrize('parts', [('train', 'val'), ('train/a',), ('.',)], ids=str)
def test_without_labels_networks_are_judged_by_agreement(capsys, tmp_path, checkpoint, parts):
    """Were images in no class folder of one class, the accuracy would be how often a network says class 0."""
    for part in parts:
        write_images(tmp_path / 'data' / part)
    arguments = ['compress', checkpoint, '--data-dir', tmp_path / 'data', *UNLABELLED, '-o', tmp_path / 'o.safetensors']
    code, out, err = run(capsys, *arguments, '--json')
    assert code == 0, err
    result = json.loads(out)
    assert result['report']['judged_by'] == 'agreement' and 'top1' not in result
    assert 'that the original names' in err and (tmp_path / 'o.safetensors').is_file()
    code, _, err = run(capsys, *arguments[:-1], tmp_path / 'p.safetensors', '--max-drop', '1')
    assert code == 2 and err.count('\n') == 1 and '--max-drop needs labels' in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ['data', 'o.safetensors', 'o.search']


def test_each_batch_that_judges_holds_all_classes(capsys, tmp_path, checkpoint, monkeypatch):
    """Folders are read class after class: the fourth batch would be the last class alone."""
    from timm_lean_cli import build_parser
    from timm_lean_cli.compress_cases import network_case
    for name, color in zip('abcd', ('black', 'red', 'blue', 'white'), strict=True):
        (tmp_path / 'train' / name).mkdir(parents=True)
        for i in range(4):
            Image.new('RGB', (8, 8), color).save(tmp_path / 'train' / name / f'{i}.png')
    args = build_parser().parse_args([
        'compress', str(checkpoint), '--data-dir', str(tmp_path), '--batch-size', '4', *UNLABELLED, '-o', 'o'])
    images = network_case(args, tmp_path).images
    assert [len(x) for x in images] == [4] * 4
    assert all(len(x.unique(dim=0)) == 4 for x in images)


def test_classes_are_checked_before_the_search(capsys, tmp_path, checkpoint):
    for i in range(11):
        write_images(tmp_path / 'data' / 'train' / f'{i:02}', 1)
        write_images(tmp_path / 'data' / 'val' / f'{i:02}', 1)
    code, _, err = run(capsys, 'compress', checkpoint, '--data-dir', tmp_path / 'data', *UNLABELLED,
                       '-o', tmp_path / 'o.safetensors')
    assert code == 2 and err.count('\n') == 1 and '10 classes' in err and 'data has 11' in err
    assert [p.name for p in tmp_path.iterdir()] == ['data']
