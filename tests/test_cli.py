"""The command line as a user meets it: output, exit codes, and one clear line for bad input."""
import argparse
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import timm_lean_cli
from timm_lean import LeanError, load_model, save_model
from timm_lean.errors import OutputError


def run(capsys, *args):
    """Exit code, stdout and stderr of a command."""
    try:
        code = timm_lean_cli.main([str(a) for a in args])
    except SystemExit as e:
        code = e.code
    return code, *capsys.readouterr()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp('ckpt') / 'model.safetensors'
    torch.manual_seed(0)
    model = timm.create_model('resnet32_cifar_s16u1', num_classes=10, layers=(2, 2, 2))
    model.pretrained_cfg['label_names'] = [str(i) for i in range(10)]
    save_model(model, path)
    return path


def test_models_lists_names_with_params_and_macs(capsys):
    names = ['resnet32_cifar_s16u1_dual', 'resnet56_cifar_s16u1_dual']
    assert run(capsys, 'models', 's16u1_dual')[:2] == (0, ''.join(f'{name}  @32\n' for name in names))
    code, out, _ = run(capsys, 'models', 's16u1_dual', '--counts')
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == names
    assert '245,642 params' in out and '319,226 params' in out
    found = json.loads(run(capsys, 'models', 'resnet34_s48u1_dual', '--counts', '--json')[1])[0]
    assert found['params'] == 11_786_968
    plain = json.loads(run(capsys, 'models', 'resnet34_s48u1_dual', '--json')[1])
    assert plain == [dict(name='resnet34_s48u1_dual', img_size=224)]


def test_info_compares_a_checkpoint_with_a_name(capsys, checkpoint):
    code, out, _ = run(capsys, 'info', 'resnet32_cifar', '--vs', checkpoint, '--img-size', '16')
    assert code == 0
    header, dense, shared = out.splitlines()
    assert header.split()[:3] == ['model', 'params', 'MACs'] and '@16' in header
    assert '464,154 (1.00x)' in dense and '142,070 (0.31x)' in shared  # by the definition in test_models.py


def test_info_measures_latency_and_memory(capsys, checkpoint):
    code, out, _ = run(capsys, 'info', checkpoint, '--latency', '--img-size', '8', '--device', 'cpu', '--json')
    report = json.loads(out)[0]
    assert code == 0 and report['latency_ms'] > 0 and report['device'] == 'cpu'
    # the widest tensors: 17 filters' responses of 8 x 8 in fp32 and their normalization at least
    assert report['peak_memory'] >= 2 * 17 * 8 * 8 * 4
    assert report['bytes'] == checkpoint.stat().st_size


def test_validate_and_predict_agree(capsys, checkpoint, tmp_path):
    code, out, _ = run(capsys, 'validate', checkpoint, '--device', 'cpu', '--workers', '0', '--json')
    metrics = json.loads(out)
    assert code == 0 and metrics['images'] == 360 and 0 <= metrics['top1'] <= metrics['top5'] <= 100
    Image.new('RGB', (32, 32), 'white').save(tmp_path / 'a.png')
    code, out, _ = run(capsys, 'predict', checkpoint, tmp_path / 'a.png', '--device', 'cpu', '--json')
    top = json.loads(out)[0]['top']
    assert code == 0 and len(top) == 5
    # an independent computation: white pixels, normalized by hand
    cfg = load_model(checkpoint).pretrained_cfg
    x = torch.tensor([(1 - m) / s for m, s in zip(cfg['mean'], cfg['std'], strict=True)]).view(1, 3, 1, 1)
    with torch.no_grad():
        probabilities = load_model(checkpoint)(x.expand(1, 3, 32, 32)).softmax(1)[0]
    assert top[0]['index'] == int(probabilities.argmax())
    assert top[0]['probability'] == pytest.approx(float(probabilities.max()), rel=1e-4)


def test_export_folds_and_writes_a_directory_timm_loads(capsys, checkpoint, tmp_path):
    code, out, _ = run(
        capsys, 'export', checkpoint, '--fold', '-o', tmp_path / 'f.safetensors', '--hf-dir', tmp_path / 'hf')
    assert code == 0 and 'folded 6 shared convolutions' in out
    x = torch.randn(2, 3, 32, 32)
    expected = load_model(checkpoint)(x)
    for model in (load_model(tmp_path / 'f.safetensors'),
                  timm.create_model(f'local-dir:{tmp_path / "hf"}', pretrained=True).eval()):
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)


def test_analyze_compares_feature_similarity(capsys, checkpoint, tmp_path):
    code, out, _ = run(
        capsys, 'analyze', checkpoint, '--similarity', '--vs', 'resnet32_cifar', '--random-weights', '--batches', '1',
        '--device', 'cpu', '-o', tmp_path / 's.png')
    assert code == 0 and out.splitlines()[0].split() == ['layer', 'before', 'after', 'change']
    values = [line.split() for line in out.splitlines()[1:]]
    assert values[-1][0] == 'mean' and all(0 <= float(v) <= 1 for row in values for v in row[1:3])
    assert Image.open(tmp_path / 's.png').size[0] > 100
    code, _, err = run(capsys, 'analyze', checkpoint, '--device', 'cpu')
    assert code == 2 and '--similarity' in err


def test_doctor_prints_versions(capsys, monkeypatch):
    monkeypatch.setattr('timm_lean_cli.doctor._python', lambda *args: '')  # new processes that import MMDetection
    _, out, _ = run(capsys, 'doctor')
    assert f'timm-lean {timm_lean_version()}' in out and f'timm {timm.__version__}' in out


def test_doctor_gives_json(capsys, monkeypatch):
    monkeypatch.setattr('timm_lean_cli.doctor._python', lambda *args: 'broken')
    code, out, _ = run(capsys, 'doctor', '--json')
    result = json.loads(out)
    assert code == bool(result['problems']) and result['found'][0].startswith(f'timm-lean {timm_lean_version()}')
    assert not any('PROBLEM' in line or 'no problems' in line for part in result.values() for line in part)


def test_every_command_gives_json():
    actions = timm_lean_cli.build_parser()._actions
    (commands,) = (a for a in actions if isinstance(a, argparse._SubParsersAction))
    assert not [name for name, parser in commands.choices.items() if '--json' not in parser._option_string_actions]


def test_the_demo_gives_json(capsys, monkeypatch):
    def demo(output, **options):
        print('1. Your network')
        return {'output': str(output), **options}
    monkeypatch.setattr('timm_lean_cli.demo_steps.demo', demo)
    code, out, err = run(capsys, 'demo', '--no-detection', '--epochs', '1', '--output', 'o', '--json')
    assert code == 0 and json.loads(out) == {'output': 'o', 'epochs': 1}
    assert 'Your network' in err and 'left out' in err
    code, out, err = run(capsys, 'demo', '--no-detection')
    assert code == 0 and not err and out.rstrip().endswith('left out.')


@pytest.mark.parametrize('arguments', [
    ['compress', 'x', '--target', 'params=0.5', '-o', 'o'], ['prune', 'x', '-o', 'o'], ['export', 'x', '-o', 'o'],
    ['share', 'x', '--params', '0.5', '-o', 'o'], ['demo']], ids=lambda a: a[0])
def test_what_writes_one_output_is_refused_under_torchrun(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('WORLD_SIZE', '2')
    code, _, err = run(capsys, *arguments)
    assert code == 2 and err.count('\n') == 1 and f'{arguments[0]} runs in one process' in err and 'torchrun' in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('command', [
    'validate', 'info', 'predict', pytest.param('prune', marks=pytest.mark.slow)])
def test_progress_is_shown_on_a_terminal_alone(capsys, tmp_path, monkeypatch, checkpoint, command):
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    data = ['--data', 'digits', '--workers', '0', '--img-size', '8']
    options = {'validate': data, 'info': data, 'predict': [tmp_path / 'a.png'],
               'prune': [*data, '--amount', '0.5', '--calibrate', '8', '-o', tmp_path / 'o.safetensors']}[command]
    word = 'predict:' if command == 'predict' else 'evaluate:'
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, 'isatty', lambda terminal=terminal: terminal)
        code, _, err = run(capsys, command, checkpoint, *options, '--device', 'cpu')
        assert code == 0 and (word in err) == terminal, err


def test_config_file_is_overridden_by_flags(capsys, tmp_path):
    (tmp_path / 'c.yaml').write_text('model: resnet20_cifar\nmodel_args: {layers: [1, 1, 1]}\nepochs: 3\nimg-size: 8\n')
    code, out, err = run(
        capsys, 'train', '--config', tmp_path / 'c.yaml', '--epochs', '1', '--train-images', '64', '--batch-size', '32',
        '--cache', '--device', 'cpu', '--output', tmp_path / 'o', '--json')
    assert code == 0, err
    result = json.loads(out)
    assert 'epoch 1/1' in err and result['best_top1'] == result['last']['eval_top1'] >= 0
    assert (tmp_path / 'o' / 'best.safetensors').is_file() and result['output'] == str(tmp_path / 'o')
    code, out, _ = run(capsys, 'train', '--config', tmp_path / 'o' / 'args.yaml', '--resume', '--device', 'cpu')
    assert code == 0 and f'best top-1 {result["best_top1"]:.2f} % in epoch 1' in out


@pytest.fixture
def broken_image_folder(tmp_path):
    for split in ('train', 'val'):
        for name in ('a', 'b'):
            (tmp_path / 'data' / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new('RGB', (8, 8)).save(tmp_path / 'data' / split / name / f'{i}.png')
    (tmp_path / 'data' / 'train' / 'b' / '2.png').write_bytes(b'not an image')
    return tmp_path / 'data'


SHARE = ['share', 'resnet20_cifar', '--random-weights', '--params', '0.5', '-o', 'o.safetensors']
SMALL = ['--model', 'resnet20_cifar', '--epochs', '1', '--batch-size', '4', '--device', 'cpu']


@pytest.mark.parametrize('arguments, words', [
    (['depth', '--seed', '9' * 30], ['seed must be a whole number']),
    (['depth', '--images-dir', 'images'], ['for COCO annotations']),
    (['train', '--model', 'resnet_nope'], ["Unknown model 'resnet_nope'"]),
    (['train', '--model', 'resnet34_cifar_s8u1', '--model-args', 'shared_rank=-1'], ['shared_rank', '-1']),
    (['train', '--model', 'resnet34_cifar_s8u1', '--model-args', 'shared_rank=0', 'unique_rank=0'], ['both 0']),
    (['train', '--model', 'resnet32_cifar_s8u1', '--model-args', 'shared_rank=72', 'dual=true'],
     ['145 basis filters', '144']),
    (['train', '--model', 'resnet20_cifar', '--model-args', 'wings=2'], ['wings']),
    (['train', '--model', 'resnet20_cifar', '--model-args', 'wings'], ['KEY=VALUE', 'wings']),
    (['train', *SMALL, '--data-dir', '/nonexistent/data'], ['/nonexistent/data', 'does not exist']),
    (['train', *SMALL, '--reg', 'basis_orto=10'], ["Unknown regularizer 'basis_orto'", 'basis_ortho']),
    (['train', *SMALL, '--reg', 'basis_ortho=ten'], ["'ten' is not a number"]),
    (['train', *SMALL, '--reg', 'basis_ortho=-1'], ['at least 0', '-1']),
    (['train', *SMALL, '--reg', 'basis_ortho=10'], ['no shared filter basis']),
    (['train', *SMALL, '--device', 'cuda:7'], ['cuda:7', 'CUDA']),
    (['train', *SMALL, '--device', 'warp'], ["Unknown device 'warp'"]),
    (['train', *SMALL, '--output', '/proc/nowhere/run'], ['/proc/nowhere/run', 'Cannot write']),
    (['train', *SMALL, '--opt', 'sgdx'], ['sgdx']),
    (['train', *SMALL, '--opt', 'fusedadam'], ['fusedadam']),
    (['train', *SMALL, '--model-args', 'drop_rate=5'], ['drop', '5']),
    (['train', *SMALL, '--batch-size', '0'], ['batch_size', '0']),
    (['train', *SMALL, '--batch-size', '100000'], ['do not fill one batch of 100000']),
    (['train', *SMALL, '--config', 'no_such_recipe'], ["'no_such_recipe'", 'cifar10_shared']),
    (['train', *SMALL, '--num-classes', '3'], ['num_classes=3', '10 classes']),
    (['train', *SMALL, '--model-args', 'num_classes=3'], ['num_classes', '--num-classes']),
    (['train', *SMALL, '--workers', '-1'], ['workers', '-1']),
    (['train', *SMALL, '--auto-augment', 'nope', '--aug', 'rrc'], ['nope', 'rand-m9']),
    (['train', *SMALL, '--device', 'meta'], ["'meta'", 'auto or cpu']),
    (['train', *SMALL, '--device', 'hpu'], ["'hpu'", 'auto or cpu']),
    (['train', '--model', 'x' * 5000], ['model', 'characters']),
    (['validate', 'x' * 300 + '.safetensors'], ['too long']),
    ([*SHARE, '--lr', '0.1'], ['--lr']),
    ([*SHARE, '--data', 'digits', '--finetune-epochs', '1', '--finetune-lr', 'nan'], ['lr', 'nan']),
    (['predict', 'resnet20_cifar', '--random-weights', 'a.png', '--top', '0'], ['--top', '0']),
    (['predict', 'resnet20_cifar', '--random-weights', 'a.png', '-o', 'x.jpg'], ['-o', 'detectors']),
    (['analyze', 'resnet20_cifar', '--random-weights', '--criteria', '--threshold', 'nan'], ['nan']),
    (['analyze', 'resnet20_cifar', '--random-weights', '--similarity', '-o', 'x.pt'], ['x.pt']),
    (['analyze', 'resnet20_cifar', '--random-weights', '--similarity', '--batches', '0'], ['--batches', '0']),
    (['models', '--nonsense'], ['--nonsense']),
    (['demo', '--epochs', 'x'], ['--epochs']),
    (['train'], ['No model given']),
    (['train', '--nonsense'], ['--nonsense']),
    (['info', 'resnet20_cifar', '--img-size', '0'], ['img_size', '0']),
    (['info', 'missing.safetensors'], ['missing.safetensors', 'not a file']),
    (['models', 'zzz'], ["'zzz'"]),
    (['predict', 'resnet20_cifar', '--random-weights', '/nonexistent.png'], ['/nonexistent.png']),
    (['export', 'resnet20_cifar'], ['--hf-dir', '-o']),
    (['export', 'resnet20_cifar', '-o', 'x.pth'], ['x.pth', '.safetensors']),
    (['validate', 'resnet20_cifar', '--random-weights', '--data-dir', '/nonexistent/data'], ['/nonexistent/data']),
], ids=lambda v: ' '.join(v)[:60])
def test_bad_input_is_one_line_and_exit_code_2(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert len(err.strip().splitlines()) == 1 and 'Traceback' not in err
    for word in words:
        assert word in err
    assert not list(tmp_path.iterdir()), 'bad input left something behind'


USES_WEIGHTS = [
    ['validate', 'M', '--workers', '0', '--img-size', '8', '--device', 'cpu'],
    ['predict', 'M', 'IMAGE', '--device', 'cpu'],
    ['prune', 'M', '--amount', '0.5', '-o', 'o.safetensors'], ['share', 'M', '--params', '0.7', '-o', 'o.safetensors'],
    ['export', 'M', '-o', 'o.safetensors', '--device', 'cpu'], ['analyze', 'M', '--criteria'],
    ['analyze', 'M', '--similarity', '--batches', '1', '--img-size', '8', '--device', 'cpu'],
    ['info', 'M', '--data', 'digits', '--workers', '0', '--img-size', '8', '--device', 'cpu'],
]


@pytest.mark.parametrize('arguments', USES_WEIGHTS, ids=lambda a: ' '.join(a[:3]))
def test_weights_are_never_a_surprise(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (32, 32)).save(tmp_path / 'i.png')
    arguments = [{'M': 'resnet20_cifar', 'IMAGE': 'i.png'}.get(a, a) for a in arguments]
    code, _, err = run(capsys, *arguments)
    assert code == 2 and err.count('\n') == 1
    assert all(word in err for word in ('resnet20_cifar', '--pretrained', '--random-weights', 'file'))
    code, _, err = run(capsys, *arguments, '--pretrained')
    assert code == 2 and "no trained weights for 'resnet20_cifar'" in err
    assert [p.name for p in tmp_path.iterdir()] == ['i.png']
    code, out, err = run(capsys, *arguments, '--random-weights', '--json')
    assert code == 0, err
    assert json.loads(out)


def test_a_file_needs_no_word_on_weights_and_two_are_one_too_many(capsys, checkpoint):
    assert run(capsys, 'validate', checkpoint, '--pretrained', '--random-weights')[0] == 2
    assert run(capsys, 'validate', checkpoint, '--img-size', '8', '--workers', '0', '--device', 'cpu')[0] == 0


@pytest.mark.parametrize('arguments', [
    ['validate', 'D'], ['analyze', 'D', '--criteria'], ['train', '--model', 'D'],
    ['export', 'D', '-o', 'o.safetensors'], ['info', 'D', '--vs', 'resnet20_cifar']], ids=lambda a: a[0])
def test_a_detector_is_named_as_one(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    save_file({'x': torch.zeros(1)}, 'd.safetensors', metadata={'timm_lean_detector': '{}'})
    code, _, err = run(capsys, *['d.safetensors' if a == 'D' else a for a in arguments])
    assert code == 2 and err.count('\n') == 1
    assert 'd.safetensors is a detector' in err and ('predict' in err or '--' in err or 'tools/' in err)
    assert [p.name for p in tmp_path.iterdir()] == ['d.safetensors']


def test_nothing_to_fold_is_a_note(capsys, tmp_path):
    code, out, _ = run(capsys, 'export', 'resnet20_cifar', '--random-weights', '--fold', '--device', 'cpu', '-o',
                       tmp_path / 'f.safetensors')
    assert code == 0 and 'nothing to fold' in out and load_model(tmp_path / 'f.safetensors')


def test_models_shared_lists_those_whose_names_say_only_a_rank(capsys):
    names = [line.split()[0] for line in run(capsys, 'models', 'shared')[1].splitlines()]
    assert {'resnet34_s48u1_dual', 'resnet56_cifar_s16u1', 'densenet121_cifar_s64u4', 'resnext50_cifar_s16u1',
            'resnet50_shared', 'mobilenetv2_100_sharedpp'} <= set(names)
    assert 'resnet20_cifar' not in names


@pytest.mark.parametrize('error, code', [
    (KeyboardInterrupt(), 130), (BrokenPipeError(), 0), (OSError(errno.ENOSPC, 'No space left on device'), 1),
    (OutputError('The disk is full.'), 1), (OSError(errno.ENAMETOOLONG, 'File name too long'), 2),
    (LeanError('Two\nlines.'), 2), (LeanError('in a worker\nLeanError: The image a.png cannot be read.'), 2)],
    ids=lambda v: type(v).__name__ if isinstance(v, BaseException) else str(v))
def test_exit_codes(capsys, monkeypatch, error, code):
    def fail(args):
        raise error

    monkeypatch.setattr('timm_lean_cli.validate.run', fail)
    result, out, err = run(capsys, 'validate', 'x')
    assert (result, out) == (code, '') and 'Traceback' not in err
    assert len(err.strip().splitlines()) == (0 if code == 0 else 1)


def test_empty_data_folder_is_named(capsys, tmp_path):
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    (tmp_path / 'val').mkdir()
    code, _, err = run(capsys, 'train', *SMALL, '--data-dir', tmp_path, '--output', tmp_path / 'o')
    assert code == 2 and f'{tmp_path}/train holds no images' in err
    assert not (tmp_path / 'o').exists()


@pytest.mark.parametrize('options', [
    ['--workers', '0'], pytest.param(['--workers', '1'], marks=pytest.mark.slow), ['--cache']])
def test_broken_image_is_named(capsys, tmp_path, broken_image_folder, options):
    code, _, err = run(
        capsys, 'train', *SMALL, '--data-dir', broken_image_folder, '--img-size', '8', *options,
        '--output', tmp_path / 'o')
    assert code == 2 and len(err.strip().splitlines()) == 1
    assert str(broken_image_folder / 'train' / 'b' / '2.png') in err
    assert not list(tmp_path.glob('o/*.safetensors'))


def test_validating_against_other_classes_is_refused(capsys, checkpoint, broken_image_folder):
    code, _, err = run(capsys, 'validate', checkpoint, '--data-dir', broken_image_folder, '--device', 'cpu')
    assert code == 2 and '10 classes' in err and '2 (a, b)' in err


def test_images_in_no_class_folder_are_no_class(capsys, checkpoint, tmp_path):
    Image.new('RGB', (8, 8)).save(tmp_path / '0.png')
    code, _, err = run(capsys, 'validate', checkpoint, '--data-dir', tmp_path, '--device', 'cpu')
    assert code == 2 and err.count('\n') == 1 and '0.png lies in no class folder' in err and 'CLASS/IMAGE' in err


def test_debug_shows_the_traceback(capsys):
    code, _, err = run(capsys, 'train', '--model', 'resnet_nope', '--debug')
    assert code == 2 and 'Traceback' in err


def test_compile_without_a_compiler_is_a_clear_error(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    code, _, err = run(capsys, 'train', *SMALL, '--compile', '--output', tmp_path / 'o')
    assert code == 2 and '--compile needs a C++ compiler' in err


def test_help_and_usage_errors_do_not_import_torch():
    """Any import of torch fails here, so these can only work without it."""
    blocker = 'import sys; sys.modules["torch"] = None; import timm_lean_cli; timm_lean_cli.main(sys.argv[1:])'
    cases = [(['--help'], 0), (['train', '--help'], 0), (['--version'], 0), (['train', '--epochs', 'x'], 2)]
    for arguments, code in cases:
        result = subprocess.run(
            [sys.executable, '-c', blocker, *arguments], capture_output=True, text=True, env=os.environ)
        assert result.returncode == code, result.stderr
        assert 'Traceback' not in result.stderr
        assert (result.stdout if code == 0 else result.stderr).strip()


def test_installed_script_runs():
    script = Path(sys.executable).with_name('timm-lean')
    result = subprocess.run([script, '--version'], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == timm_lean_version()


def timm_lean_version():
    from timm_lean import __version__
    return __version__


def test_the_shell_completes(tmp_path):
    line = 'timm-lean prune --gran'
    environment = {**os.environ, '_ARGCOMPLETE': '1', '_ARGCOMPLETE_STDOUT_FILENAME': str(tmp_path / 'out'),
                   'COMP_LINE': line, 'COMP_POINT': str(len(line)), '_ARGCOMPLETE_IFS': ' '}
    subprocess.run([sys.executable, '-m', 'timm_lean_cli'], env=environment, check=True, timeout=60)
    assert (tmp_path / 'out').read_text().split() == ['--granularity']
