"""Weights stored as int8: rounded as by hand, packed too, read by everything, and nothing damaged gets in."""
import json

import numpy as np
import pytest
import timm
import torch
from conftest import randomize_batchnorm
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from timm_lean import CheckpointError, LeanError, load_model, save_model
from timm_lean.checkpoint.format import read_header
from timm_lean.checkpoint.int8 import dequantize, int8_shapes, quantize
from timm_lean.checkpoint.packing import packed_shapes
from timm_lean.layers import SharedBasisConv2d
from timm_lean.pruning import kernel_report, prune_kernels
from timm_lean_cli import main

NAME = 'layer2.0.conv2.weight'


def small(**kwargs):
    torch.manual_seed(0)
    model = timm.create_model('resnet20_cifar', layers=(1, 2, 1), channels=(8, 16, 16), **kwargs)
    return randomize_batchnorm(model).eval()


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp('int8') / 'm.safetensors'
    save_model(small(), path, weights='int8')
    return path


def test_a_weight_rounded_by_hand():
    weight = torch.tensor([[1., -127.], [0.5, 0.], [0., 0.], [-63.5, 31.75]])
    stored, names, report = quantize({'a.weight': weight, 'a.bias': torch.ones(4), 'b.weight': torch.ones(4)})
    assert names == ['a.weight'] == [layer.name for layer in report.layers]
    assert stored.keys() == {'a.weight::int8', 'a.weight::scale', 'a.bias', 'b.weight'}
    assert stored['a.weight::int8'].tolist() == [[1, -127], [127, 0], [0, 0], [-127, 64]]  # 63.5 is rounded to even
    assert stored['a.weight::scale'].tolist() == pytest.approx([1, 0.5 / 127, 0, 0.5])
    restored = dequantize('a.weight', stored.__getitem__)
    assert torch.allclose(restored, torch.tensor([[1., -127.], [0.5, 0.], [0., 0.], [-63.5, 32.]]))
    assert report.layers[0].error == pytest.approx(0.25 / np.linalg.norm(weight.numpy()))


@pytest.mark.parametrize('make', [
    small, lambda: small(shared_rank=6, unique_rank=1), lambda: prune_kernels(small(), amount=0.8),
    lambda: small().half(), lambda: timm.create_model('test_vit', num_classes=3)])
def test_every_entry_is_within_half_a_step(make, tmp_path):
    """Of its filter, whose largest entry is 127 steps; what is no weight is kept bit for bit."""
    model = make()
    report = save_model(model, tmp_path / 'm.safetensors', weights='int8')
    loaded = load_model(tmp_path / 'm.safetensors')
    before, after = model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    names = {layer.name for layer in report.layers}
    assert {n for n, t in before.items() if t.ndim == 4} <= names
    for name, tensor in before.items():
        a, b = tensor.double().numpy(), after[name].double().numpy()
        if name in names:
            rows = np.abs(a).reshape(len(a), -1)
            step = rows.max(1) / 127
            assert (np.abs(a - b).reshape(rows.shape) <= 0.501 * step[:, None]).all(), name
            assert not b[a == 0].any()
            assert np.linalg.norm(a - b) == pytest.approx(
                next(la.error for la in report.layers if la.name == name) * np.linalg.norm(a), rel=1e-3, abs=1e-9)
        else:
            assert np.array_equal(a, b), name


def test_a_file_is_a_quarter_and_with_pruned_kernels_less(tmp_path):
    model = timm.create_model('resnet20_cifar')
    sizes = []
    for network, options in ((model, {}), (model, dict(weights='int8')),
                             (prune_kernels(model, amount=0.8), dict(weights='int8'))):
        save_model(network, tmp_path / 'm.safetensors', **options)
        sizes.append((tmp_path / 'm.safetensors').stat().st_size)
    # scales, batch norms and the header besides
    assert sizes[1] < 0.31 * sizes[0] and sizes[2] < 0.12 * sizes[0]
    header = read_header(tmp_path / 'm.safetensors')
    assert header['format'] == 2 and NAME in header['int8'] and NAME + '::int8' in header['packed']
    assert kernel_report(load_model(tmp_path / 'm.safetensors')).share == pytest.approx(0.8, abs=0.01)


def test_a_shared_basis_is_stored_once(tmp_path):
    model = small(shared_rank=6, unique_rank=1)
    save_model(model, tmp_path / 'm.safetensors', weights='int8')
    names = read_header(tmp_path / 'm.safetensors')['int8']
    bases = {id(m.basis.weight) for m in model.modules() if isinstance(m, SharedBasisConv2d)}
    assert sum('basis.weight' in name for name in names) == len(bases)
    assert any('coeff' in name for name in names) and any('unique' in name for name in names)


def test_stored_again_it_is_the_same(good, tmp_path):
    loaded = load_model(good)
    report = save_model(loaded, tmp_path / 'm.safetensors', weights='int8')
    first, second = load_file(good), load_file(tmp_path / 'm.safetensors')
    assert all(torch.equal(t, second[k]) for k, t in first.items() if k.endswith('::int8'))
    assert max(layer.error for layer in report.layers) < 1e-6


def test_plain_readers_cannot_take_it_for_floats(good):
    """All names differ, so that not even an inattentive loader fills weights with integers."""
    with safe_open(good, framework='pt') as f:
        assert not {k for k in f.keys() if k in read_header(good)['int8']}  # noqa: SIM118
    with pytest.raises(RuntimeError, match='Missing key'):
        timm.create_model('resnet20_cifar', layers=(1, 2, 1), channels=(8, 16, 16), checkpoint_path=str(good))


def test_mmdetection_reads_it(good):
    weights = pytest.importorskip('timm_lean.mmdet.weights', exc_type=ImportError)
    tensors = weights.load_from_safetensors(str(good))['state_dict']
    assert torch.equal(tensors[NAME], load_model(good).state_dict()[NAME])


@pytest.mark.slow
def test_a_detector(tmp_path):
    support = pytest.importorskip('mmdet_support', exc_type=ImportError)
    from timm_lean.mmdet.detector import build_detector, describe, export_detector, load_detector, save_detector
    cfg = support.scenes_config(tmp_path)
    model = build_detector(cfg)
    save_detector(model, tmp_path / 'd.safetensors', describe(cfg, model, {}))
    folder = export_detector(None, tmp_path / 'd.safetensors', tmp_path / 'd', weights='int8')
    file = folder / 'model.safetensors'
    assert file.stat().st_size < 0.4 * (tmp_path / 'd.safetensors').stat().st_size
    for source in (folder, file):
        loaded = load_detector(source).state_dict()
        for name, tensor in model.state_dict().items():
            lost = (loaded[name] - tensor).abs().max() if tensor.numel() else 0.
            assert lost <= (0.501 / 127 * tensor.abs().max() if name.endswith('weight') and tensor.ndim > 1 else 0.)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_what_int8_cannot_hold(value, tmp_path):
    model = small()
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = value
    with pytest.raises(LeanError, match=r'conv1\.weight.*not finite'):
        save_model(model, tmp_path / 'm.safetensors', weights='int8')
    with pytest.raises(LeanError, match="'float' or 'int8', not as 'int4'"):
        save_model(model, tmp_path / 'm.safetensors', weights='int4')
    assert not list(tmp_path.iterdir())


def rewrite(good, path, int8=None, change=lambda tensors: None):
    with safe_open(good, framework='pt') as f:
        entry = json.loads(f.metadata()['timm_lean'])
    tensors = load_file(good)
    entry['int8'] = entry['int8'] if int8 is None else int8(entry['int8'])
    change(tensors)
    save_file(tensors, path, metadata={'timm_lean': json.dumps(entry)})


@pytest.mark.parametrize('int8', [
    lambda n: None, lambda n: 3, lambda n: {}, lambda n: [3], lambda n: [[]], lambda n: [*n, 'x'], lambda n: n[1:],
    lambda n: [*n, n[0]], lambda n: [*n, 'conv1'], lambda n: 'conv1.weight'])
def test_damaged_headers(good, tmp_path, int8):
    rewrite(good, tmp_path / 'm.safetensors', int8)
    with pytest.raises(CheckpointError, match=r'int8|does not fit') as e:
        load_model(tmp_path / 'm.safetensors')
    assert str(tmp_path) in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 1000


@pytest.mark.parametrize('change', [
    lambda v, s: (v.float(), s), lambda v, s: (v.to(torch.uint8), s), lambda v, s: (v, s.double()),
    lambda v, s: (v, s[:-1].clone()), lambda v, s: (v, s[:, None]), lambda v, s: (v, -s), lambda v, s: (v, s / 0),
    lambda v, s: (v, s * float('nan')), lambda v, s: (v.flatten(), s), lambda v, s: (v[:-1].clone(), s)])
def test_damaged_tensors(good, tmp_path, change):
    def both(tensors):
        values, scale = change(tensors[NAME + '::int8'], tensors[NAME + '::scale'])
        tensors.update({NAME + '::int8': values, NAME + '::scale': scale})

    rewrite(good, tmp_path / 'm.safetensors', change=both)
    with pytest.raises(CheckpointError, match='int8 weight'):
        load_model(tmp_path / 'm.safetensors')


def test_a_float_beside_its_int8(good, tmp_path):
    rewrite(good, tmp_path / 'm.safetensors', change=lambda tensors: tensors.update({NAME: torch.zeros(16, 16, 3, 3)}))
    with pytest.raises(CheckpointError, match='nothing under its own name'):
        load_model(tmp_path / 'm.safetensors')


def test_little_data_is_no_bomb():
    """Of packed int8 an entry in the file becomes 16 floats at most: 64 times its bytes, as of packed floats."""
    shapes = {'w::int8::kernels': (100, 31, 31), 'w::int8::mask': (2000 // 8,)}
    with pytest.raises(CheckpointError, match='claims'):
        packed_shapes(shapes, {'w::int8': [2000, 1, 31, 31]})
    assert packed_shapes({**shapes, 'w::int8::mask': (1600 // 8,)}, {'w::int8': [1600, 1, 31, 31]})
    assert int8_shapes({'w::int8': (4, 2), 'w::scale': (4,)}, ['w']) == {'w': (4, 2)}


def test_export_command(good, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(small(), 'm.safetensors')
    assert main(['export', 'm.safetensors', '-o', 'i8.safetensors', '--weights', 'int8', '--device', 'cpu']) == 0
    out = capsys.readouterr().out
    assert f'\n{NAME} ' in out and '\ni8.safetensors, int8 ' in out
    a, b = load_model('i8.safetensors').state_dict(), load_model(good).state_dict()
    assert all(torch.equal(t, b[k]) for k, t in a.items())
    for flags, words in (
            (['--weights', 'int8', '--hf-dir', 'd'], '-o FILE'), (['--int8', '-o', 'a.safetensors'], '--onnx'),
            (['--weights', 'int8', '--half', '-o', 'a.safetensors'], '--half'),
            (['--calibrate', '8', '-o', 'a.safetensors', '--data', 'digits'], '--weights int8'),
            (['--calibrate', '8', '-o', 'a.safetensors', '--weights', 'int8'], '--calibrate needs training images')):
        assert main(['export', 'm.safetensors', *flags]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count('\n') == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ['i8.safetensors', 'm.safetensors']


def test_export_command_calibrates_where_data_is_given(tmp_path, capsys, monkeypatch):
    """The file holds what Python's way gives, the folder beside it the network as it was."""
    from timm_lean.export.rounding import round_weights
    from timm_lean.training.data import open_eval_loader
    monkeypatch.chdir(tmp_path)
    save_model(small(), 'm.safetensors')
    options = ['--weights', 'int8', '--data', 'digits', '--workers', '0', '--device', 'cpu', '--hf-dir', 'hf']
    assert main(['export', 'm.safetensors', '-o', 'a.safetensors', *options, '--calibrate', '64']) == 0
    assert 'error of the output' in capsys.readouterr().out
    loader = open_eval_loader(small(), 'digits', split='train', limit=64)
    expected, found = round_weights(small(), calibration=loader).state_dict(), load_model('a.safetensors').state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
    for name, tensor in load_file('hf/model.safetensors').items():
        assert torch.equal(tensor, small().state_dict()[name]), name
    assert main(['export', 'm.safetensors', '-o', 'b.safetensors', *options, '--calibrate', '0']) == 0
    assert main(['export', 'm.safetensors', '-o', 'c.safetensors', *options[:2], '--device', 'cpu']) == 0
    plain, without = (load_model(f).state_dict() for f in ('b.safetensors', 'c.safetensors'))
    assert all(torch.equal(tensor, without[name]) for name, tensor in plain.items())
    assert not torch.equal(plain['fc.bias'], found['fc.bias'])
