"""`--calibrate` of prune and share: on with data, said in the output, better than without."""
import json

import pytest
import timm
import torch
from conftest import randomize_batchnorm

from timm_lean import load_model, save_model
from timm_lean_cli import main

DIGITS = ['--data', 'digits', '--img-size', '16', '--workers', '0', '--device', 'cpu']


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
    torch.manual_seed(0)
    model = randomize_batchnorm(timm.create_model('resnet20_cifar', layers=(2, 2, 2), channels=(8, 8, 16)))
    path = tmp_path_factory.mktemp('dense') / 'dense.safetensors'
    save_model(model, path)
    return str(path)


def run(capsys, *args):
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize('command', [
    ['prune', '--amount', '0.5'],
    ['prune', '--amount', '0.5', '--criterion', 'output'],
    ['prune', '--granularity', 'channel', '--ratio', '0.5', '--round-to', '4'],
    ['prune', '--granularity', 'block', '--count', '1'],
    ['share', '--params', '0.6'],
], ids=lambda c: ' '.join(c[:3]))
def test_calibrates_where_data_is_given(dense, tmp_path, capsys, command):
    """The digits have 1,437 training images; a quarter of those asked for is held out."""
    out = tmp_path / 'o.safetensors'
    code, text, err = run(capsys, *command, dense, '-o', out, *DIGITS, '--calibrate', '64', '--json')
    assert code == 0, err
    report = json.loads(text)['calibration']
    assert (report['images'], report['held_out']) == (48, 16)
    assert report['after'] <= report['before']
    load_model(out)


def test_off_by_zero_and_without_data(dense, tmp_path, capsys):
    for options in ([*DIGITS, '--calibrate', '0'], []):
        code, text, _ = run(
            capsys, 'prune', dense, '--amount', '0.5', '-o', tmp_path / 'o.safetensors', '--json', *options)
        assert code == 0 and 'calibration' not in json.loads(text)


def test_without_training_images_it_says_so(dense, tmp_path, capsys):
    """A folder for evaluation alone still gives accuracies."""
    from PIL import Image
    for name in '01':
        (tmp_path / 'val' / name).mkdir(parents=True)
        Image.new('RGB', (16, 16)).save(tmp_path / 'val' / name / 'a.png')
    options = ['prune', dense, '--amount', '0.5', '--data-dir', tmp_path, '--img-size', '16', '--workers', '0']
    code, text, err = run(capsys, *options, '-o', tmp_path / 'o.safetensors')
    assert code == 0 and err.startswith('not calibrated: ') and 'top-1' in text
    code, _, err = run(capsys, *options, '-o', tmp_path / 'p.safetensors', '--calibrate', '8')
    assert code == 2 and err.count('\n') == 1 and not (tmp_path / 'p.safetensors').exists()


@pytest.mark.parametrize('options, message', [
    (['--amount', '0.5', '--calibrate', '8'], '--calibrate needs training images'),
    (['--amount', '0.5', *DIGITS, '--calibrate', '-3'], '--calibrate must be'),
    (['--amount', '0.5', *DIGITS, '--calibrate', '2'], 'at least 4'),
    (['--amount', '0.5', *DIGITS, '--calibrate-positions', '0'], 'positions of calibration must be'),
    (['--amount', '0.5', '--calibrate-positions', '8'], '--calibrate-positions is for calibration'),
    (['--amount', '0.5', '--criterion', 'output'], "criterion='output' needs calibration"),
    (['--granularity', 'block', '--count', '1'], 'needs calibration'),
    (['--granularity', 'block', *DIGITS, '--calibrate', '8'], 'exactly one of count, blocks and ratio'),
    (['--granularity', 'block', '--blocks', 'layer1.9'], 'layer1.9'),
    (['--granularity', 'channel', '--count', '3'], '--count belongs to --granularity block'),
    (['--granularity', 'block', '--count', '1', '--criterion', 'det'], '--criterion belongs to --granularity kernel'),
])
def test_bad_input(dense, tmp_path, capsys, options, message):
    code, _, err = run(capsys, 'prune', dense, '-o', tmp_path / 'o.safetensors', *options)
    assert code == 2 and err.count('\n') == 1 and message in err
    assert not list(tmp_path.iterdir())
