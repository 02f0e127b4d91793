"""`--calibrate` of prune and share: on with data, said in the output, better than without."""
import json

import pytest
import timm
import torch
from conftest import randomize_batchnorm
from PIL import Image

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
    (['--granularity', 'channel', '--criterion', 'output'], "criterion='output' needs calibration"),
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


def write_images(folder, count=12):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new('RGB', (16, 16), (20 * i, 255 - 20 * i, 90)).save(folder / f'{i}.png')


def prune(capsys, dense, data, output, *options):
    return run(capsys, 'prune', dense, '--amount', '0.5', '--data-dir', data, '--img-size', '16', '--workers', '0',
               '--device', 'cpu', '-o', output, '--json', *options)


def test_calibration_needs_no_labels_and_no_evaluation_images(dense, tmp_path, capsys):
    """The same images give the same network, wherever they lie; accuracies are left out, with the reason."""
    results = []
    for name in ('classes/train/a', 'train/train', 'flat'):
        write_images(tmp_path / name)
        output = tmp_path / f'{len(results)}.safetensors'
        code, text, err = prune(capsys, dense, tmp_path / name.split('/')[0], output)
        assert code == 0, err
        assert err.startswith('accuracy not measured: ') and err.count('\n') == 1
        results.append(json.loads(text))
        assert results[-1]['before']['top1'] is None is results[-1]['pruned']['top1']
    assert results[0]['calibration'] == results[1]['calibration'] == results[2]['calibration']
    assert results[0]['calibration']['images'] == 9


def test_other_classes_leave_the_accuracy_out(dense, tmp_path, capsys):
    for part in ('train', 'val'):
        for i in range(11):
            write_images(tmp_path / 'data' / part / f'{i:02}', 1)
    code, text, err = prune(capsys, dense, tmp_path / 'data', tmp_path / 'o.safetensors')
    assert code == 0 and 'accuracy not measured' in err and '10 classes' in err and 'has 11' in err
    assert 'calibration' in json.loads(text)


@pytest.mark.parametrize('options, broken, words', [
    (['--calibrate', '0'], False, 'no class folder'), (['--finetune-epochs', '1'], False, 'no class folder'),
    ([], True, '0.png cannot be read')], ids=str)
def test_what_is_asked_for_and_cannot_be_had_stays_an_error(dense, tmp_path, capsys, options, broken, words):
    for part in ('train', 'val/1') if broken else ('train', 'val'):
        write_images(tmp_path / 'data' / part)
    if broken:
        (tmp_path / 'data' / 'val' / '1' / '0.png').write_bytes(b'no image')
    code, _, err = prune(capsys, dense, tmp_path / 'data', tmp_path / 'o.safetensors', *options)
    assert code == 2 and err.count('\n') == 1 and words in err
    assert not (tmp_path / 'o.safetensors').exists()


@pytest.mark.parametrize('data', ['nowhere', 'empty'])
def test_data_of_no_use_is_an_error(dense, tmp_path, capsys, data):
    (tmp_path / 'empty').mkdir()
    code, _, err = prune(capsys, dense, tmp_path / data, tmp_path / 'o.safetensors')
    assert code == 2 and data in err.splitlines()[-1] and not (tmp_path / 'o.safetensors').exists()
