"""Checkpoints: what is saved comes back bit for bit, and nothing that is not whole gets in."""
import copy
import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomize_batchnorm
from fuzz.safetensors_file import join, parts, with_entry
from safetensors import safe_open
from safetensors.torch import save_file
from timm.utils import ModelEmaV3

import timm_lean.checkpoint
from timm_lean import CheckpointError, LeanError, OutputError, fold, load_model, save_model
from timm_lean.checkpoint.format import load_any, read_header, save_hf_dir
from timm_lean.checkpoint.recipe import Recipe, recipe_of
from timm_lean.layers import SharedBasisConv2d


def model_of(name: str, **kwargs) -> nn.Module:
    if name.startswith(('resnet20_', 'resnet32_')):
        kwargs.setdefault('layers', [2, 2, 2])  # one of each pair of layers that could differ
    return randomize_batchnorm(timm.create_model(name, **kwargs)).eval()


def image(model: nn.Module) -> torch.Tensor:
    chs, size, _ = model.default_cfg['input_size']
    return torch.randn(1, getattr(model, 'in_chans', chs), min(size, 64), min(size, 64))


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """The same tensors, of the same dtypes, in the same order, and the same parameters behind them."""
    a, b = model.state_dict(), other.state_dict()
    assert list(a) == list(b)
    for k in a:
        assert a[k].dtype == b[k].dtype
        assert torch.equal(a[k], b[k]), k
    assert [k for k, _ in model.named_parameters()] == [k for k, _ in other.named_parameters()]


# --- round trips ------------------------------------------------------------------------------------------------------

ROUND_TRIPS = {
    'thin': lambda: model_of('resnet20_cifar'),
    'shared': lambda: model_of('resnet32_cifar_s16u1_dual'),
    'other ranks': lambda: model_of('resnet20_cifar', shared_rank=6, unique_rank=2, dual=True),
    'head and channels': lambda: model_of('resnet32_cifar_s8u1', num_classes=7, in_chans=1),
    'no head': lambda: model_of('resnet32_cifar_s8u1', num_classes=0),
    'pool': lambda: model_of('resnet32_cifar_s8u1', global_pool='max'),
    'sharedpp': lambda: model_of('resnet50_sharedpp'),
    'mobilenet': lambda: model_of('mobilenetv2_100_sharedpp', num_classes=5),
    'folded': lambda: fold(model_of('resnet32_cifar_s8u1', num_classes=7)),
    'folded mobilenet': lambda: fold(model_of('mobilenetv2_100_sharedpp')),
    'stock resnet18': lambda: model_of('resnet18', num_classes=4),
    'stock efficientnet': lambda: model_of('efficientnet_lite0'),
    'stock convnext': lambda: model_of('convnext_atto'),
}


@pytest.mark.parametrize('kind', [
    pytest.param(k, marks=pytest.mark.slow) if k in ('sharedpp', 'folded mobilenet') else k for k in ROUND_TRIPS])
def test_round_trip_is_bit_for_bit(kind, tmp_path):
    model = ROUND_TRIPS[kind]()
    save_model(model, tmp_path / 'm.safetensors')
    loaded = load_model(tmp_path / 'm.safetensors')
    assert_same(model, loaded)
    assert not loaded.training
    x = image(model)
    assert torch.equal(model(x), loaded(x))
    assert recipe_of(loaded) == recipe_of(model)


@pytest.mark.parametrize('kind', [
    'shared', 'head and channels', 'folded', pytest.param('stock resnet18', marks=pytest.mark.slow)])
def test_a_loaded_model_saves_to_the_same_file(kind, tmp_path):
    save_model(ROUND_TRIPS[kind](), tmp_path / 'a.safetensors')
    save_model(load_model(tmp_path / 'a.safetensors'), tmp_path / 'b.safetensors')
    assert parts((tmp_path / 'a.safetensors').read_bytes()) == parts((tmp_path / 'b.safetensors').read_bytes())
    assert_same(load_model(tmp_path / 'a.safetensors'), load_model(tmp_path / 'b.safetensors'))


def test_a_reset_head_is_saved_as_it_is(tmp_path):
    model = model_of('resnet32_cifar_s8u1')
    model.reset_classifier(3)
    save_model(model, tmp_path / 'm.safetensors')
    assert load_model(tmp_path / 'm.safetensors').num_classes == 3


def test_a_shared_basis_is_stored_once(tmp_path):
    model = model_of('resnet32_cifar_s16u1_dual')
    save_model(model, tmp_path / 'm.safetensors')
    with safe_open(tmp_path / 'm.safetensors', framework='pt') as f:
        assert sum('basis' in k for k in f.keys()) == 6  # noqa: SIM118
    loaded = load_model(tmp_path / 'm.safetensors')
    assert len({id(m.basis) for m in loaded.modules() if isinstance(m, SharedBasisConv2d)}) == 6


def test_label_names_are_kept(tmp_path):
    model = model_of('resnet20_cifar', num_classes=3)
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': ['cat', 'dog', 'eel'], 'mean': (0.1, 0.2, 0.3)}
    save_model(model, tmp_path / 'm.safetensors')
    cfg = load_model(tmp_path / 'm.safetensors').pretrained_cfg
    assert cfg['label_names'] == ['cat', 'dog', 'eel']
    assert cfg['mean'] == (0.1, 0.2, 0.3)
    assert cfg['input_size'] == (3, 32, 32)
    assert cfg['num_classes'] == 3


def test_training_mode_and_channels_last_do_not_matter(tmp_path):
    model = model_of('resnet20_cifar').train().to(memory_format=torch.channels_last)
    save_model(model, tmp_path / 'm.safetensors')
    assert_same(model, load_model(tmp_path / 'm.safetensors'))
    assert model.training


def test_num_classes_replaces_the_head_only(tmp_path):
    model = model_of('resnet32_cifar_s8u1')
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': list('abcdefghij')}
    save_model(model, tmp_path / 'm.safetensors')
    loaded = load_model(tmp_path / 'm.safetensors', num_classes=4)
    assert loaded.num_classes == loaded.pretrained_cfg['num_classes'] == 4
    assert not loaded.pretrained_cfg.get('label_names')
    a, b = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a if not k.startswith('fc.'))
    same = load_model(tmp_path / 'm.safetensors', num_classes=10)
    assert torch.equal(same.fc.weight, model.fc.weight)


def test_the_header_is_plain_json(tmp_path):
    save_model(fold(model_of('resnet32_cifar_s8u1', num_classes=7)), tmp_path / 'm.safetensors')
    header = read_header(tmp_path / 'm.safetensors')
    assert header['format'] == 1
    assert header['architecture'] == 'resnet32_cifar_s8u1'
    assert header['model_args']['num_classes'] == 7
    assert header['steps'] == [{'op': 'fold'}]
    assert header['pretrained_cfg']['num_classes'] == 7


def test_there_is_no_pickle_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, 'save', lambda *a, **k: pytest.fail('torch.save was called'))
    monkeypatch.setattr(torch, 'load', lambda *a, **k: pytest.fail('torch.load was called'))
    model = model_of('resnet20_cifar')
    save_model(model, tmp_path / 'm.safetensors')
    load_model(tmp_path / 'm.safetensors')
    data = (tmp_path / 'm.safetensors').read_bytes()
    size, = struct.unpack('<Q', data[:8])
    tensors = {k: v for k, v in json.loads(data[8:8 + size]).items() if k != '__metadata__'}
    assert len(data) == 8 + size + max(t['data_offsets'][1] for t in tensors.values()), 'nothing but tensors follows'


@pytest.mark.parametrize('name, kwargs', [
    ('resnet32_cifar_s16u1_dual', dict(layers=[2, 2, 2])),
    ('resnet32_cifar_s8u1', dict(layers=[3, 2, 2], num_classes=7)),
    ('resnet18', dict(num_classes=3))])
def test_timm_loads_a_file_by_checkpoint_path(name, kwargs, tmp_path):
    model = model_of(name, **kwargs)
    save_model(model, tmp_path / 'm.safetensors')
    assert_same(model, timm.create_model(name, checkpoint_path=str(tmp_path / 'm.safetensors'), **kwargs))


# --- local-dir exports ------------------------------------------------------------------------------------------------

HF = {
    'shared': lambda: model_of('resnet32_cifar_s16u1_dual', num_classes=7),
    'other ranks': lambda: model_of('resnet20_cifar', shared_rank=6, unique_rank=2, dual=True),
    'mobilenet': lambda: model_of('mobilenetv2_100_sharedpp', num_classes=5),
    'folded': lambda: fold(model_of('resnet20_cifar', num_classes=7, shared_rank=6, unique_rank=1)),
    'folded mobilenet': lambda: fold(model_of('mobilenetv2_100_shared')),
    'one channel': lambda: model_of('resnet32_cifar_s8u1', in_chans=1),
    'stock': lambda: model_of('resnet18', num_classes=4),
}


@pytest.mark.parametrize('kind', HF)
def test_timm_loads_a_local_dir(kind, tmp_path):
    model = HF[kind]()
    save_hf_dir(model, tmp_path / 'hf')
    assert sorted(os.listdir(tmp_path / 'hf')) == ['config.json', 'model.safetensors']
    loaded = timm.create_model(f'local-dir:{tmp_path}/hf', pretrained=True).eval()
    assert_same(model, loaded)
    x = image(model)
    assert torch.equal(model(x), loaded(x))


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['shared', 'folded'])
def test_a_fresh_process_loads_a_local_dir(kind, tmp_path):
    model = HF[kind]()
    save_hf_dir(model, tmp_path / 'hf')
    x = image(model)
    save_file({'x': x, 'y': model(x).detach()}, tmp_path / 'io.safetensors')
    code = (
        'import timm, timm_lean, torch, sys; from safetensors.torch import load_file; torch.set_num_threads(1);'
        f"model = timm.create_model('local-dir:{tmp_path}/hf', pretrained=True).eval();"
        f"io = load_file('{tmp_path}/io.safetensors');"
        "assert torch.equal(model(io['x']), io['y']); print('equal')")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == 'equal', done.stderr


@pytest.mark.parametrize('kind', ['shared', 'folded'])
def test_features_only_from_a_local_dir(kind, tmp_path):
    model = HF[kind]()
    save_hf_dir(model, tmp_path / 'hf')
    features = timm.create_model(f'local-dir:{tmp_path}/hf', pretrained=True, features_only=True).eval()
    x = image(model)
    expected = model.forward_intermediates(x, intermediates_only=True)
    outs = features(x)
    assert [o.shape[1] for o in outs] == features.feature_info.channels() == [16, 16, 32, 64]
    for out, e in zip(outs, expected, strict=True):
        torch.testing.assert_close(out, e)


def test_another_class_count_from_a_local_dir(tmp_path):
    save_hf_dir(HF['folded'](), tmp_path / 'hf')
    assert timm.create_model(f'local-dir:{tmp_path}/hf', pretrained=True, num_classes=3).num_classes == 3


@pytest.mark.parametrize('kind', ['folded', 'shared'])
def test_a_model_from_a_local_dir_is_saved_again(kind, tmp_path):
    model = HF[kind]()
    save_hf_dir(model, tmp_path / 'hf')
    again = timm.create_model(f'local-dir:{tmp_path}/hf', pretrained=True).eval()
    save_model(again, tmp_path / 'm.safetensors')
    assert_same(model, load_model(tmp_path / 'm.safetensors'))
    save_hf_dir(again, tmp_path / 'hf2')
    assert_same(model, timm.create_model(f'local-dir:{tmp_path}/hf2', pretrained=True))


def test_export_replaces_an_earlier_export(tmp_path):
    save_hf_dir(HF['shared'](), tmp_path / 'hf')
    model = HF['folded']()
    save_hf_dir(model, tmp_path / 'hf')
    assert_same(model, timm.create_model(f'local-dir:{tmp_path}/hf', pretrained=True))
    assert os.listdir(tmp_path) == ['hf']


def test_load_any_takes_a_name_a_file_and_a_local_dir(tmp_path):
    model = HF['folded']()
    save_hf_dir(model, tmp_path / 'hf')
    save_model(model, tmp_path / 'm.safetensors')
    assert_same(model, load_any(str(tmp_path / 'm.safetensors')))
    assert_same(model, load_any(f'local-dir:{tmp_path}/hf'))
    assert load_any('resnet20_cifar', num_classes=3).num_classes == 3
    assert load_any(f'local-dir:{tmp_path}/hf', num_classes=3).num_classes == 3


@pytest.mark.parametrize('source, words', [
    ('resnet20_sifar', 'Unknown model.*resnet20_sifar'), ('hf-hub:timm/resnet18', 'not downloaded'),
    ('/nowhere/m.safetensors', 'not a file'), ('local-dir:/nowhere', '/nowhere'), ('', 'Unknown model|not a file')])
def test_load_any_names_what_it_cannot_load(source, words):
    with pytest.raises(LeanError, match=words):
        load_any(source)


# --- saving is all or nothing -----------------------------------------------------------------------------------------

def _half_a_file(tensors, path, metadata=None):
    Path(path).write_bytes(b'half')
    raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'm.safetensors'
    save_model(model_of('resnet20_cifar'), path)
    before = path.read_bytes()
    monkeypatch.setattr(timm_lean.checkpoint.format, 'save_file', _half_a_file)
    with pytest.raises(OutputError, match='No space left on device'):
        save_model(model_of('resnet20_cifar'), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ['m.safetensors']


def test_a_failed_first_save_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(timm_lean.checkpoint.format, 'save_file', _half_a_file)
    with pytest.raises(OutputError, match='No space left on device'):
        save_model(model_of('resnet20_cifar'), tmp_path / 'm.safetensors')
    assert os.listdir(tmp_path) == []


def test_a_failed_export_leaves_the_old_folder(tmp_path, monkeypatch):
    model = HF['shared']()
    save_hf_dir(model, tmp_path / 'hf')

    def fail(model, folder, **kwargs):
        (Path(folder) / 'config.json').write_text('{}')
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(timm_lean.checkpoint.format, 'save_for_hf', fail)
    with pytest.raises(OutputError, match='No space left on device'):
        save_hf_dir(HF['folded'](), tmp_path / 'hf')
    assert os.listdir(tmp_path) == ['hf']
    assert_same(model, timm.create_model(f'local-dir:{tmp_path}/hf', pretrained=True))


def test_a_saved_file_has_ordinary_permissions(tmp_path):
    path = tmp_path / 'm.safetensors'
    save_model(model_of('resnet20_cifar'), path)
    (tmp_path / 'other').touch()
    assert path.stat().st_mode == (tmp_path / 'other').stat().st_mode


def test_missing_folders_are_made(tmp_path):
    save_model(model_of('resnet20_cifar'), tmp_path / 'a' / 'b' / 'm.safetensors')
    assert load_model(tmp_path / 'a' / 'b' / 'm.safetensors')


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(LeanError, match='Cannot write to the folder'):
        save_model(model_of('resnet20_cifar'), tmp_path / 'file' / 'm.safetensors')


def test_an_export_onto_a_file_is_a_clear_error(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(LeanError, match='is a file'):
        save_hf_dir(model_of('resnet20_cifar'), tmp_path / 'file')


def _with_another_layer() -> nn.Module:
    model = model_of('resnet20_cifar')
    model.fc = nn.Linear(64, 11)
    return model


@pytest.mark.parametrize('make, words', [
    (lambda: nn.Linear(2, 2), 'no timm name'),
    (lambda: timm.create_model('resnet20_cifar', features_only=True), 'features_only'),
    (lambda: timm.create_model('resnet18', norm_layer=nn.BatchNorm2d), 'plain data'),
    (_with_another_layer, 'does not fit'),
])
def test_what_could_not_be_loaded_is_not_saved(make, words, tmp_path):
    with pytest.raises(CheckpointError, match=words):
        save_model(make(), tmp_path / 'm.safetensors')
    assert os.listdir(tmp_path) == []


# --- files that must be refused ---------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def good(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('good') / 'good.safetensors'
    save_model(timm.create_model('resnet20_cifar'), path)
    return path


def refused(path: Path, data: bytes, words: str | None) -> str:
    """Load the bytes; the CheckpointError's message, which names the file and matches `words`."""
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=words) as e:
        load_model(path)
    assert str(path) in str(e.value)
    return str(e.value)


@pytest.mark.parametrize('size', [0, 4, 8, 100, 5000, -1, -1000])
def test_truncated(good, tmp_path, size):
    data = good.read_bytes()
    refused(tmp_path / 'm.safetensors', data[:size], 'not a whole safetensors file|does not hold|cannot be loaded')


def test_trailing_bytes(good, tmp_path):
    refused(tmp_path / 'm.safetensors', good.read_bytes() + b'more', 'not a whole safetensors file')


def test_a_safetensors_file_of_someone_else_says_what_to_do(tmp_path):
    save_file(timm.create_model('resnet20_cifar').state_dict(), tmp_path / 'm.safetensors')
    with pytest.raises(CheckpointError, match=r'without a timm-lean header.*checkpoint_path.*save_model'):
        load_model(tmp_path / 'm.safetensors')


@pytest.mark.parametrize('data', [b'', b'hello', b'\x80\x02}q\x00.', b'\x00' * 1000, b'PK\x03\x04' + b'a' * 500])
def test_not_safetensors(tmp_path, data):
    refused(tmp_path / 'm.safetensors', data, 'not a whole safetensors file')


def test_a_pickle_is_not_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'exploded',)
    torch.save({'x': Bomb()}, tmp_path / 'm.safetensors')
    with pytest.raises(CheckpointError):
        load_model(tmp_path / 'm.safetensors')
    assert not (tmp_path / 'exploded').exists()


@pytest.mark.parametrize('name', ['missing.safetensors', '.'])
def test_missing_files_and_directories(tmp_path, name):
    with pytest.raises(CheckpointError, match='is not a file'):
        load_model(tmp_path / name)


def test_a_wrong_shape_is_named(good, tmp_path):
    model = load_model(good)
    tensors = {**model.state_dict(), 'layer2.0.conv1.weight': torch.zeros(32, 16, 1, 1)}
    header, _ = parts(good.read_bytes())
    save_file(tensors, tmp_path / 'm.safetensors', metadata=header['__metadata__'])
    with pytest.raises(CheckpointError, match=r'layer2\.0\.conv1\.weight \[32, 16, 1, 1\] instead of \[32, 16, 3, 3\]'):
        load_model(tmp_path / 'm.safetensors')


def test_a_missing_and_an_unexpected_tensor_are_named(good, tmp_path):
    tensors = load_model(good).state_dict()
    tensors['extra.weight'] = tensors.pop('layer2.0.conv1.weight')
    header, _ = parts(good.read_bytes())
    save_file(tensors, tmp_path / 'm.safetensors', metadata=header['__metadata__'])
    with pytest.raises(CheckpointError, match=r'missing layer2\.0\.conv1\.weight; unexpected extra\.weight'):
        load_model(tmp_path / 'm.safetensors')


def test_a_wrong_class_count(good, tmp_path):
    args = {**read_header(good)['model_args'], 'num_classes': 11}
    data = with_entry(good.read_bytes(), model_args=args)
    refused(tmp_path / 'm.safetensors', data, r'fc\.bias \[10\] instead of \[11\]')


def test_the_tensors_of_another_architecture(good, tmp_path):
    data = with_entry(good.read_bytes(), architecture='resnet32_cifar')
    refused(tmp_path / 'm.safetensors', data, r'missing layer1\.3.* and \d+ more')


@pytest.mark.parametrize('name', ['resnet20_sifar', '', 'os.system', '../../etc/passwd', 'hf-hub:timm/resnet18',
                                  'local-dir:/tmp'])
def test_an_unknown_architecture(good, tmp_path, name):
    refused(tmp_path / 'm.safetensors', with_entry(good.read_bytes(), architecture=name), 'Unknown architecture')


@pytest.mark.parametrize('steps, words', [
    ([{'op': 'melt'}], "Unknown recipe step 'melt'.*fold"),
    ([{'op': 'fold', 'how': 'x'}], "'fold' does not take"),
    ([{'op': 'fold', 'model': 1}], "'fold' does not take"),
    ([{'op': 'fold'}], 'found no shared convolution'),
    ([{'op': ['fold']}], 'must be an object'),
    (['fold'], 'must be an object'),
    ([{}], 'must be an object'),
])
def test_bad_steps(good, tmp_path, steps, words):
    refused(tmp_path / 'm.safetensors', with_entry(good.read_bytes(), steps=steps), words)


@pytest.mark.parametrize('version', [3, 0, '1', None, [1], 1e300])
def test_another_format_version(good, tmp_path, version):
    refused(tmp_path / 'm.safetensors', with_entry(good.read_bytes(), format=version), 'format.*this version reads 1')


@pytest.mark.parametrize('entry', ['', '{', 'null', '[]', '1', '"x"', '{"format": 1', '[' * 100_000, '{"a":' * 50_000,
                                   '{"format": ' + '1' * 5000 + '}', '\\ud800', 'NaN'])
def test_bad_json(good, tmp_path, entry):
    refused(tmp_path / 'm.safetensors', with_entry(good.read_bytes(), entry), 'damaged|format')


@pytest.mark.parametrize('key', ['architecture', 'model_args', 'steps', 'pretrained_cfg'])
@pytest.mark.parametrize('value', [None, 3, 'x', [], {}, ['x'], {'x': 1}])
def test_header_fields_of_another_type(good, tmp_path, key, value):
    valid = {'architecture': str, 'model_args': dict, 'steps': list, 'pretrained_cfg': dict}[key]
    if isinstance(value, valid) and (key == 'pretrained_cfg' or value in ([], {})):
        pytest.skip('of the right type')
    message = refused(
        tmp_path / 'm.safetensors', with_entry(good.read_bytes(), **{key: value}),
        'damaged|Unknown architecture|cannot create|must be an object')
    assert len(message) < 1000


def test_nested_json_of_any_depth(good, tmp_path):
    data = good.read_bytes()
    for depth in [*range(20, 1100, 180), *range(880, 1000, 12)]:
        for key in ('architecture', 'model_args', 'steps', 'format'):
            entry = json.dumps({**json.loads(parts(data)[0]['__metadata__']['timm_lean']), key: 'HERE'})
            value = '[' * depth + ']' * depth
            value = f'{{"layers": {value}}}' if key == 'model_args' else value
            path = tmp_path / 'm.safetensors'
            path.write_bytes(with_entry(data, entry.replace('"HERE"', value)))
            with pytest.raises(CheckpointError):
                load_model(path)


@pytest.mark.parametrize('size', [0, 1, 2 ** 20, 10 ** 8 + 1, 2 ** 31, 2 ** 63 - 1, 2 ** 63, 2 ** 64 - 1])
def test_a_header_length_that_is_not_the_headers(good, tmp_path, size):
    refused(tmp_path / 'm.safetensors', struct.pack('<Q', size) + good.read_bytes()[8:], 'not a whole safetensors file')


@pytest.mark.parametrize('change', [
    {'shape': [10 ** 12, 10 ** 12]}, {'shape': [-1, 4]}, {'shape': [2 ** 63]}, {'data_offsets': [0, 2 ** 62]},
    {'data_offsets': [8, 0]}, {'dtype': 'F1024'}, {'dtype': 3}, {'shape': 'x'}])
def test_tensor_entries_that_lie(good, tmp_path, change):
    header, body = parts(good.read_bytes())
    header['fc.weight'].update(change)
    refused(tmp_path / 'm.safetensors', join(header, body), 'safetensors|does not fit|cannot be loaded')


@pytest.mark.parametrize('args', [
    dict(pretrained=True), dict(checkpoint_path='/nowhere/evil.pth'), dict(pretrained_cfg='tv_in1k', pretrained=True),
    dict(pretrained=True, pretrained_cfg_overlay={'file': '/nowhere/evil.pth'}), dict(features_only=True),
    dict(cache_dir='/nowhere'), dict(device='cpu'), dict(dtype='float64'), dict(base='resnet18'), dict(recipe=[])],
    ids=lambda args: '+'.join(args))
@pytest.mark.parametrize('name', ['resnet20_cifar', pytest.param('resnet18', marks=pytest.mark.slow)])
def test_arguments_that_reach_outside_the_file_are_refused(good, tmp_path, monkeypatch, name, args):
    """A checkpoint describes a structure; it does not download, open other files or choose devices."""
    touched = []
    for target in ('timm.models._builder.load_pretrained', 'timm.models._factory.load_checkpoint',
                   'torch.hub.download_url_to_file'):
        monkeypatch.setattr(target, lambda *a, target=target, **k: touched.append(target))
    path = tmp_path / 'm.safetensors'
    if name == 'resnet18':
        save_model(timm.create_model(name, num_classes=2), path)
    data = path.read_bytes() if path.exists() else good.read_bytes()
    own = json.loads(parts(data)[0]['__metadata__']['timm_lean'])['model_args']
    refused(path, with_entry(data, model_args={**own, **args}), next(iter(args)) + '|damaged')
    assert not touched


# --- recipes ----------------------------------------------------------------------------------------------------------

def test_a_recipe_names_the_lean_entry_only_for_restructured_models():
    assert recipe_of(model_of('resnet20_cifar')).create_args()[0] == 'resnet20_cifar'
    name, args = recipe_of(fold(model_of('resnet32_cifar_s8u1'))).create_args()
    assert name == 'lean'
    assert args['base'] == 'resnet32_cifar_s8u1'
    assert args['recipe'] == [{'op': 'fold'}]


def test_equal_models_give_equal_files(tmp_path):
    """Several metadata entries would be written in the order of a hash that changes from file to file."""
    model = model_of('resnet20_cifar')
    for i in range(10):
        save_model(model, tmp_path / str(i))
    assert len({(tmp_path / str(i)).read_bytes() for i in range(10)}) == 1


class Parallel(nn.Module):
    """As DDP: the network under the name `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize('wrap', [
    torch.compile, nn.DataParallel, Parallel, lambda m: torch.compile(Parallel(m)), ModelEmaV3,
    torch.optim.swa_utils.AveragedModel])
@pytest.mark.parametrize('save', [save_model, save_hf_dir])
def test_wrappers_are_taken_off(wrap, save, tmp_path):
    model = model_of('resnet20_cifar')
    file, folder = tmp_path / 'm.safetensors', tmp_path / 'hf'
    save(wrap(model), file if save is save_model else folder)
    assert_same(model, load_any(str(file) if save is save_model else f'local-dir:{folder}'))


@pytest.mark.parametrize('name, kwargs', [
    ('resnet18', dict(num_classes=3)), ('mobilenetv2_035', {}), ('resnet32_cifar_s8u1', {})])
def test_features_of_a_file_are_those_of_timm(name, kwargs, tmp_path):
    model = model_of(name, **kwargs)
    save_model(model, tmp_path / 'm.safetensors')
    x = image(model)
    expected = timm.create_model(name, features_only=True)
    for indices in (None, (1, 3)):
        features = load_model(tmp_path / 'm.safetensors', features_only=True, out_indices=indices)
        assert not features.training
        outs = features(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
        channels = expected.feature_info.channels()
        for i, out in zip(indices or range(len(channels)), outs, strict=True):
            torch.testing.assert_close(out, maps[i])
            assert out.shape[1] == channels[i]
        assert features.feature_info.channels() == [channels[i] for i in indices or range(len(channels))]


@pytest.mark.parametrize('indices', [(), (9,), (-1,), ('1',), (True,)])
def test_feature_levels_that_are_not_there(good, indices):
    with pytest.raises(LeanError, match=r'out_indices=.*feature levels 0 to 3'):
        load_model(good, features_only=True, out_indices=indices)


def test_a_recipe_is_a_copy():
    model = fold(model_of('resnet32_cifar_s8u1'))
    recipe = recipe_of(model)
    before = copy.deepcopy(recipe)
    recipe.steps.append({'op': 'x'})
    recipe.model_args['x'] = 1
    assert recipe_of(model) == before
    assert isinstance(before, Recipe)


def test_error_messages_are_one_line(good, tmp_path):
    for data in (good.read_bytes()[:100], with_entry(good.read_bytes(), architecture='x'),
                 with_entry(good.read_bytes(), steps=[{'op': 'melt'}]), with_entry(good.read_bytes(), '{'),
                 with_entry(good.read_bytes(), model_args={'num_classes': 10 ** 30})):
        assert '\n' not in refused(tmp_path / 'm.safetensors', data, None)


def test_timms_weights_are_asked_for_by_name(monkeypatch):
    """Without `pretrained` weights are random; with it they are timm's, and what cannot be had is one line."""
    with pytest.raises(LeanError, match=r"no trained weights for 'resnet20_cifar'"):
        load_any('resnet20_cifar', pretrained=True)
    asked = []

    def offline(name, pretrained=False, **kwargs):
        asked.append((name, pretrained))
        if pretrained:
            raise OSError('no route to host\nfor several reasons')
        return timm.models.create_model(name, **kwargs)

    monkeypatch.setattr('timm_lean.checkpoint.format.timm.create_model', offline)
    with pytest.raises(LeanError, match=r"timm's weights for 'resnet10t' cannot be had \(OSError\)") as e:
        load_any('resnet10t', pretrained=True)
    assert '\n' not in str(e.value) and asked[-1] == ('resnet10t', True)
