"""Checkpoints: what is saved comes back bit for bit, and nothing that is not whole gets in."""
import copy
import errno
import json
import os
import random
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomize_batchnorm
from safetensors import safe_open
from safetensors.torch import save_file

import timm_lean.checkpoint
from timm_lean import CheckpointError, LeanError, OutputError, fold, load_model, save_model
from timm_lean.checkpoint.format import load_any, read_header, save_hf_dir
from timm_lean.checkpoint.recipe import Recipe, recipe_of
from timm_lean.layers import SharedBasisConv2d


def model_of(name: str, **kwargs) -> nn.Module:
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


@pytest.mark.parametrize('kind', ROUND_TRIPS)
def test_round_trip_is_bit_for_bit(kind, tmp_path):
    model = ROUND_TRIPS[kind]()
    save_model(model, tmp_path / 'm.safetensors')
    loaded = load_model(tmp_path / 'm.safetensors')
    assert_same(model, loaded)
    assert not loaded.training
    x = image(model)
    assert torch.equal(model(x), loaded(x))
    assert recipe_of(loaded) == recipe_of(model)


@pytest.mark.parametrize('kind', ['shared', 'head and channels', 'folded', 'stock resnet18'])
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
    ('resnet32_cifar_s16u1_dual', {}), ('resnet32_cifar_s8u1', dict(num_classes=7)), ('resnet18', dict(num_classes=3))])
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


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The safetensors header and the bytes behind it."""
    size, = struct.unpack('<Q', data[:8])
    return json.loads(data[8:8 + size]), data[8 + size:]


def join(header: dict[str, Any] | str, body: bytes) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack('<Q', len(text)) + text + body


def with_entry(data: bytes, entry: str | dict[str, Any] | None = None, **changes: Any) -> bytes:
    """The file with another `timm_lean` entry, or with changes to it."""
    header, body = parts(data)
    if entry is None:
        entry = {**json.loads(header['__metadata__']['timm_lean']), **changes}
    header['__metadata__']['timm_lean'] = entry if isinstance(entry, str) else json.dumps(entry)
    return join(header, body)


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


@pytest.mark.parametrize('version', [2, 0, '1', None, [1], 1e300])
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
    for depth in [*range(20, 1100, 20), *range(880, 1000, 3)]:
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


HOSTILE_SIZES = {
    'a million blocks': ('resnet20_cifar', dict(layers=[1_000_000, 1, 1])),
    'a quintillion blocks': ('resnet20_cifar', dict(layers=[10 ** 18, 1, 1])),
    'many stages': ('resnet20_cifar', dict(layers=[1] * 100_000, channels=[4] * 100_000)),
    'huge rank': ('resnet20_cifar', dict(shared_rank=10 ** 9)),
    'rank beyond int64': ('resnet20_cifar', dict(shared_rank=10 ** 30)),
    'huge rank and width': ('resnet20_cifar', dict(channels=[10 ** 6] * 3, shared_rank=10 ** 6)),
    'wide': ('resnet20_cifar', dict(channels=[10 ** 6] * 3)),
    'wider': ('resnet20_cifar', dict(channels=[10 ** 12] * 3)),
    'classes': ('resnet20_cifar', dict(num_classes=10 ** 12)),
    'classes beyond int64': ('resnet20_cifar', dict(num_classes=10 ** 30)),
    'input channels': ('resnet20_cifar', dict(in_chans=10 ** 15)),
    'wide, on the real device': ('resnet20_cifar', dict(channels=[2 ** 12] * 3, device='cpu')),
    'classes, on the real device': ('resnet20_cifar', dict(num_classes=10 ** 7, device='cpu')),
    'stock blocks': ('resnet18', dict(layers=[10 ** 8, 1, 1, 1])),
    'stock width': ('resnet18', dict(base_width=10 ** 9)),
    'stock features': ('efficientnet_lite0', dict(num_features=10 ** 9)),
    'stock widths': ('convnext_atto', dict(dims=[10 ** 7] * 4)),
    'stock depths': ('convnext_atto', dict(depths=[5 * 10 ** 7, 2, 6, 2])),
    'stock depth': ('vit_tiny_patch16_224', dict(depth=5 * 10 ** 7)),
    'stock image': ('vit_tiny_patch16_224', dict(img_size=10 ** 7)),
}

LOAD_ALL = """
import resource, sys, time
import timm_lean
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
timm_lean.load_model(sys.argv[1])
for path in sys.argv[2:]:
    before, start = peak(), time.monotonic()
    try:
        timm_lean.load_model(path)
        outcome = 'loaded'
    except timm_lean.CheckpointError as e:
        outcome = 'refused' if len(str(e)) < 2000 else 'refused at length'
    except BaseException as e:
        outcome = type(e).__name__
    megabytes, seconds = peak() - before, time.monotonic() - start
    outcome += f', {megabytes} MB' * (megabytes > 300) + f', {seconds:.0f} s' * (seconds > 5)
    print(outcome, flush=True)
"""


@pytest.mark.timeout(180)
def test_hostile_sizes_cost_no_memory_and_no_time(good, tmp_path):
    """In a process of its own, so that the peak memory is that of these files and a blow-up ends only that process."""
    paths = []
    for i, (name, args) in enumerate(HOSTILE_SIZES.values()):
        paths.append(tmp_path / f'{i}.safetensors')
        paths[-1].write_bytes(with_entry(good.read_bytes(), architecture=name, model_args={'num_classes': 10, **args}))
    done = subprocess.run(
        [sys.executable, '-c', LOAD_ALL, good, *paths], capture_output=True, text=True, timeout=170, check=False)
    outcomes = done.stdout.splitlines()
    assert len(outcomes) == len(paths), f'ended at {list(HOSTILE_SIZES)[len(outcomes)]}: {done.stderr[-2000:]}'
    assert dict(zip(HOSTILE_SIZES, outcomes, strict=True)) == dict.fromkeys(HOSTILE_SIZES, 'refused')


@pytest.mark.parametrize('args', [
    dict(pretrained=True), dict(checkpoint_path='/nowhere/evil.pth'), dict(pretrained_cfg='tv_in1k', pretrained=True),
    dict(pretrained=True, pretrained_cfg_overlay={'file': '/nowhere/evil.pth'}), dict(features_only=True),
    dict(cache_dir='/nowhere'), dict(device='cpu'), dict(dtype='float64'), dict(base='resnet18'), dict(recipe=[])],
    ids=lambda args: '+'.join(args))
@pytest.mark.parametrize('name', ['resnet20_cifar', 'resnet18'])
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


# --- fuzzing ----------------------------------------------------------------------------------------------------------

def _flip(rng: random.Random, data: bytes, low: int, high: int) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        out[rng.randrange(low, high)] ^= 1 << rng.randrange(8)
    return bytes(out)


def flip_in_header(rng, data):
    return _flip(rng, data, 0, 8 + struct.unpack('<Q', data[:8])[0])


def flip_in_tensors(rng, data):
    return _flip(rng, data, 8 + struct.unpack('<Q', data[:8])[0], len(data))


def flip_in_entry(rng, data):
    start = data.index(b'timm_lean')
    return _flip(rng, data, start, data.index(b'pretrained_cfg', start))


def truncate(rng, data):
    return data[:rng.choice((rng.randrange(len(data)), rng.randrange(3000)))]


def insert(rng, data):
    at = rng.choice((rng.randrange(len(data)), rng.randrange(3000)))
    return data[:at] + rng.randbytes(rng.randint(1, 50)) + data[at:]


def cut_out(rng, data):
    at = rng.randrange(3000)
    return data[:at] + data[at + rng.randint(1, 50):]


def header_length(rng, data):
    size, = struct.unpack('<Q', data[:8])
    new = rng.choice((size + rng.randint(-50, 50), rng.getrandbits(64), rng.getrandbits(30), 2 ** 63, 0))
    return struct.pack('<Q', max(new, 0)) + data[8:]


def json_value(rng, data):
    """Another value for one field of the recipe, or of the arguments within it."""
    values = [None, True, -1, 0, 10 ** 9, 10 ** 30, 1e308, '', 'x' * 1000, [], [[]], {}, {'op': 'fold'}, [3] * 10_000,
              [1_000_000, 1, 1], 'cpu', 'resnet18', 'hf-hub:a/b', [None], [{'op': 'fold'}] * 50, '\x00', 0.5]
    entry = json.loads(parts(data)[0]['__metadata__']['timm_lean'])
    where = rng.choice((entry, entry['model_args'], entry['pretrained_cfg']))
    keys = ['layers', 'channels', 'conv_shortcut', 'num_classes', 'in_chans', 'global_pool', 'shared_rank',
            'unique_rank', 'dual', 'drop_rate', 'features_only', 'nonsense']
    where[rng.choice([*where, *keys] if where is entry['model_args'] else list(where))] = rng.choice(values)
    return with_entry(data, entry)


def json_text(rng, data):
    text = list(parts(data)[0]['__metadata__']['timm_lean'])
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text))
        text[at:at + rng.randint(0, 3)] = rng.choice(['{', '}', '[', ']', '"', ',', ':', '9', '\\', '\x00', '-', 'e9'])
    return with_entry(data, ''.join(text))


def duplicate_key(rng, data):
    header, body = parts(data)
    key = rng.choice([k for k in header if k != '__metadata__'])
    other = header[rng.choice([k for k in header if k != '__metadata__'])]
    return join(json.dumps(header)[:-1] + f', {json.dumps(key)}: {json.dumps(other)}}}', body)


def another_dtype(rng, data):
    header, body = parts(data)
    for key in rng.sample([k for k in header if k != '__metadata__'], rng.randint(1, 5)):
        header[key]['dtype'] = rng.choice(['I32', 'I64', 'F64', 'F16', 'BF16', 'U8', 'BOOL', 'F8_E4M3', 'C64', 'X', ''])
    return join(header, body)


def another_layout(rng, data):
    header, body = parts(data)
    names = [k for k in header if k != '__metadata__']
    entry = header[rng.choice(names)]
    kind = rng.choice(('shape', 'offsets', 'swap', 'rename', 'drop'))
    if kind == 'shape':
        entry['shape'] = rng.choice([[], [0], entry['shape'][::-1], [*entry['shape'], 1], [2 ** 40], [10 ** 30]])
    elif kind == 'offsets':
        entry['data_offsets'] = [rng.randrange(10 ** 6), rng.choice((rng.randrange(10 ** 6), 2 ** 62))]
    elif kind == 'swap':
        other = rng.choice(names)
        header[other]['data_offsets'], entry['data_offsets'] = entry['data_offsets'], header[other]['data_offsets']
    elif kind == 'rename':
        header[rng.choice(('x', '', 'fc.weight', 'layer1'))] = header.pop(rng.choice(names))
    else:
        del header[rng.choice(names)]
    return join(header, body)


MUTATIONS = [flip_in_header, flip_in_tensors, flip_in_entry, truncate, insert, cut_out, header_length, json_value,
             json_text, duplicate_key, another_dtype, another_layout]


def fuzz(data: bytes, path: Path, start: int, count: int) -> dict[str, int]:
    """Load mutated files; anything but a CheckpointError or a model fails the test.

    Returns:
        How many files were refused and how many were loaded.
    """
    outcome = {'refused': 0, 'loaded': 0}
    for seed in range(start, start + count):
        mutation = MUTATIONS[seed % len(MUTATIONS)]
        path.write_bytes(mutation(random.Random(seed), data))
        begin = time.process_time()  # a hang ends by the test's timeout
        try:
            model = load_model(path)
        except CheckpointError as e:
            outcome['refused'] += 1
            assert len(str(e)) < 5000, f'{mutation.__name__} seed {seed}: a message of {len(str(e))} characters'
        except BaseException as e:
            raise AssertionError(f'{mutation.__name__} seed {seed}: {type(e).__name__}: {e}') from e
        else:
            outcome['loaded'] += 1
            assert isinstance(model, nn.Module)
        assert time.process_time() - begin < 5, f'{mutation.__name__} seed {seed}'
    return outcome


@pytest.mark.timeout(180)
@pytest.mark.parametrize('kind, start, count', [
    ('dense', 0, 100), ('folded', 0, 50),
    pytest.param('dense', 1000, 800, marks=pytest.mark.slow),
    pytest.param('folded', 2000, 200, marks=pytest.mark.slow)])
def test_mutated_files_give_a_checkpoint_error_or_a_model(kind, start, count, tmp_path):
    model = timm.create_model('resnet20_cifar')
    if kind == 'folded':
        model = fold(timm.create_model('resnet20_cifar', shared_rank=2, unique_rank=1).eval())
    save_model(model, tmp_path / 'good.safetensors')
    data = (tmp_path / 'good.safetensors').read_bytes()
    load_model(tmp_path / 'good.safetensors')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.process_time()
    outcome = fuzz(data, tmp_path / 'm.safetensors', start, count)
    assert sum(outcome.values()) == count
    assert outcome['refused'] > count / 2, outcome
    assert time.process_time() - begin < 40
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB


# --- recipes ----------------------------------------------------------------------------------------------------------

def test_a_recipe_names_the_lean_entry_only_for_restructured_models():
    assert recipe_of(model_of('resnet20_cifar')).create_args()[0] == 'resnet20_cifar'
    name, args = recipe_of(fold(model_of('resnet32_cifar_s8u1'))).create_args()
    assert name == 'lean'
    assert args['base'] == 'resnet32_cifar_s8u1'
    assert args['recipe'] == [{'op': 'fold'}]


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
