"""Packed checkpoints: smaller, the same bit for bit, and nothing damaged gets in."""
import json
import resource
import struct

import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomize_batchnorm
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from timm_lean import CheckpointError, load_model, save_model
from timm_lean.checkpoint.format import read_header, save_hf_dir
from timm_lean.checkpoint.packing import pack, packed_shapes, unpack
from timm_lean.pruning import prune_kernels


def pruned(amount: float, name: str = 'resnet20_cifar', **kwargs) -> nn.Module:
    model = randomize_batchnorm(timm.create_model(name, **kwargs)).eval()
    model = prune_kernels(model, criterion='spectral_norm', amount=amount)
    return model


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


@pytest.mark.parametrize('name, kwargs', [
    ('resnet20_cifar', {}), ('resnet20_cifar', dict(num_classes=3, in_chans=1)), ('resnet32_cifar_s16u1_dual', {}),
    ('mobilenetv2_035', {}), ('regnetx_002', {})])
def test_round_trip_is_bit_for_bit(name, kwargs, tmp_path):
    model = pruned(0.7, name, **kwargs)
    save_model(model, tmp_path / 'm.safetensors')
    assert read_header(tmp_path / 'm.safetensors')['packed']
    loaded = load_model(tmp_path / 'm.safetensors')
    a, b = model.state_dict(), loaded.state_dict()
    assert list(a) == list(b)
    assert all(same_bits(a[k], b[k]) for k in a)


def test_a_pruned_file_is_small(tmp_path):
    """At 90 % pruned the convolutions take a tenth, and a bit for each kernel."""
    model = pruned(0.9, 'resnet32_cifar')
    save_model(model, tmp_path / 'packed.safetensors')
    save_model(model, tmp_path / 'plain.safetensors', packed=False)
    convs = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    stored = load_file(tmp_path / 'packed.safetensors')
    packed = sum(t.numel() * t.element_size() for k, t in stored.items() if '::' in k)
    assert packed < 0.11 * sum(4 * w.numel() for w in convs)
    sizes = [(tmp_path / f'{kind}.safetensors').stat().st_size for kind in ('packed', 'plain')]
    assert sizes[0] < 0.15 * sizes[1]


def test_what_is_not_pruned_stays_plain(tmp_path):
    for amount in (0.0, 0.01):
        model = pruned(amount)
        save_model(model, tmp_path / 'm.safetensors')
        assert 'packed' not in read_header(tmp_path / 'm.safetensors')
        with safe_open(tmp_path / 'm.safetensors', framework='pt') as f:
            assert set(f.keys()) == set(model.state_dict())


def test_zeros_that_no_pruning_made_stay_plain(tmp_path):
    """A file without steps loads in plain timm, whatever its values."""
    model = timm.create_model('resnet20_cifar')
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.zeros_(module.weight)
    save_model(model, tmp_path / 'm.safetensors')
    assert set(load_file(tmp_path / 'm.safetensors')) == set(model.state_dict())
    timm.create_model('resnet20_cifar', checkpoint_path=str(tmp_path / 'm.safetensors'))


def test_plain_on_request_and_in_a_local_dir(tmp_path):
    model = pruned(0.9)
    save_model(model, tmp_path / 'm.safetensors', packed=False)
    assert set(load_file(tmp_path / 'm.safetensors')) == set(model.state_dict())
    assert same_bits(load_model(tmp_path / 'm.safetensors').conv1.weight, model.conv1.weight)
    timm.create_model('resnet20_cifar', checkpoint_path=str(tmp_path / 'm.safetensors'))
    save_hf_dir(model, tmp_path / 'hf')
    assert set(load_file(tmp_path / 'hf' / 'model.safetensors')) == set(model.state_dict())


def test_a_packed_file_loads_with_another_head_and_saves_again(tmp_path):
    save_model(pruned(0.8), tmp_path / 'a.safetensors')
    assert load_model(tmp_path / 'a.safetensors', num_classes=3).num_classes == 3
    save_model(load_model(tmp_path / 'a.safetensors'), tmp_path / 'b.safetensors')
    a, b = load_file(tmp_path / 'a.safetensors'), load_file(tmp_path / 'b.safetensors')
    assert a.keys() == b.keys() and all(same_bits(a[k], b[k]) for k in a)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.tuples(*[st.integers(1, 9)] * 2, *[st.integers(1, 4)] * 2), st.floats(0, 1), st.integers(0, 9),
       st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
def test_any_weight_is_packed_exactly(shape, dead, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).to(dtype)
    weight[torch.rand(shape[:2], generator=generator) < dead] = 0
    stored, shapes = pack({'w': weight})
    assert packed_shapes({k: tuple(t.shape) for k, t in stored.items()}, shapes) == {'w': shape}
    back = unpack('w', shapes['w'], stored.__getitem__) if shapes else stored['w']
    assert same_bits(back, weight)
    assert sum(t.numel() * t.element_size() for t in stored.values()) <= weight.numel() * weight.element_size()


def test_minus_zero_and_nan_are_kept():
    weight = torch.zeros(8, 8, 3, 3)
    weight[0, 0, 1, 1], weight[1, 1, 0, 0], weight[2, 2] = -0.0, float('nan'), -0.0
    stored, shapes = pack({'w': weight})
    assert shapes
    assert same_bits(unpack('w', shapes['w'], stored.__getitem__), weight)


@pytest.mark.parametrize('size', [3, 7, 31])
def test_a_dead_layer_is_stored_in_a_bounded_share(size):
    weight = torch.zeros(64, 64, size, size)
    stored, shapes = pack({'w': weight})
    assert packed_shapes({k: tuple(t.shape) for k, t in stored.items()}, shapes)
    assert same_bits(unpack('w', shapes['w'], stored.__getitem__), weight)
    assert sum(t.numel() * t.element_size() for t in stored.values()) < weight.numel() * 4 / 30


# --- files that must be refused ---------------------------------------------------------------------------------------

NAME = 'layer2.0.conv2.weight'


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('good') / 'good.safetensors'
    save_model(pruned(0.9), path)
    return path


def rewrite(good, path, tensors=None, packed=None):
    """The file with other tensors, or another `packed` entry."""
    with safe_open(good, framework='pt') as f:
        metadata = f.metadata()
    header = json.loads(metadata['timm_lean'])
    header['packed'] = header['packed'] if packed is None else packed(header['packed'])
    metadata['timm_lean'] = json.dumps(header)
    save_file({**load_file(good), **(tensors or {})}, path, metadata=metadata)


@pytest.mark.parametrize('packed', [
    lambda p: None, lambda p: [], lambda p: 3, lambda p: {}, lambda p: {'x': [1, 1, 1, 1]}, lambda p: {**p, NAME: 3},
    lambda p: {**p, NAME: [32, 32, 3]}, lambda p: {**p, NAME: [32, 32, 3, 3, 1]}, lambda p: {**p, NAME: [32, 32, 3, 0]},
    lambda p: {**p, NAME: [32, 32, 3, -3]}, lambda p: {**p, NAME: [32., 32, 3, 3]}, lambda p: {**p, NAME: [True] * 4},
    lambda p: {**p, NAME: ['32', 32, 3, 3]}, lambda p: {**p, NAME: [32, 33, 3, 3]},
    lambda p: {**p, NAME: [32, 64, 3, 3]}, lambda p: {**p, NAME: [64, 16, 3, 3]},
    lambda p: {**p, NAME: [10 ** 9, 10 ** 9, 3, 3]},
    lambda p: {**p, NAME: [10 ** 30, 1, 1, 1]}, lambda p: {**p, 'fc.weight': [10, 64, 1, 1]},
    lambda p: {k: v for k, v in p.items() if k != NAME}])
def test_damaged_headers(good, tmp_path, packed):
    path = tmp_path / 'm.safetensors'
    rewrite(good, path, packed=packed)
    with pytest.raises(CheckpointError, match=r'packed|does not fit') as e:
        load_model(path)
    assert str(path) in str(e.value) and '\n' not in str(e.value) and len(str(e.value)) < 1000


@pytest.mark.parametrize('change', [
    lambda k, m: (k[:-1], m), lambda k, m: (torch.cat([k, k[:1]]), m), lambda k, m: (k, m ^ 1),
    lambda k, m: (k, m[:-1]), lambda k, m: (k, torch.cat([m, m[:1]])), lambda k, m: (k, m.float()),
    lambda k, m: (k, m.to(torch.int8)), lambda k, m: (k.flatten(1), m), lambda k, m: (k[:, :2], m),
    lambda k, m: (k[:0], torch.zeros_like(m)), lambda k, m: (k, torch.full_like(m, 255))])
def test_damaged_tensors(good, tmp_path, change):
    tensors = load_file(good)
    kernels, mask = change(tensors[NAME + '::kernels'], tensors[NAME + '::mask'])
    path = tmp_path / 'm.safetensors'
    rewrite(good, path, {NAME + '::kernels': kernels.contiguous(), NAME + '::mask': mask})
    with pytest.raises(CheckpointError, match='packed tensor'):
        load_model(path)


def test_bits_behind_the_last_kernel(tmp_path):
    """`fc`-less model with a 3-channel stem: 16 x 3 kernels are whole bytes; 1 x 16 ones of one class are not."""
    mask, kernels = torch.tensor([0b10000001], dtype=torch.uint8), torch.ones(2, 1, 1)
    stored = {'w::kernels': kernels, 'w::mask': mask}
    with pytest.raises(CheckpointError, match='marks 2 kernels of 5'):
        unpack('w', [5, 1, 1, 1], stored.__getitem__)


def test_a_plain_tensor_beside_its_packed_form(good, tmp_path):
    path = tmp_path / 'm.safetensors'
    rewrite(good, path, {NAME: torch.zeros(32, 32, 3, 3)})
    with pytest.raises(CheckpointError, match='nothing under its own name'):
        load_model(path)


def test_a_small_file_cannot_ask_for_much_memory(tmp_path):
    """A network of 4 GB of convolutions in a file of a few hundred kB."""
    model = pruned(0.9)
    save_model(model, tmp_path / 'good.safetensors')
    data = (tmp_path / 'good.safetensors').read_bytes()
    size, = struct.unpack('<Q', data[:8])
    header = json.loads(data[8:8 + size])
    entry = json.loads(header['__metadata__']['timm_lean'])
    wide = timm.create_model('resnet20_cifar', channels=[16, 32, 64])
    shapes = {k: tuple(v.shape) for k, v in wide.state_dict().items()}
    tensors, entry['packed'] = {}, {}
    for k, shape in shapes.items():
        if len(shape) == 4:
            entry['packed'][k] = [8192, 8192, *shape[2:]]
            tensors[k + '::kernels'] = torch.zeros(0, *shape[2:])
            tensors[k + '::mask'] = torch.zeros(8, dtype=torch.uint8)
        else:
            tensors[k] = torch.zeros(shape)
    entry['model_args'] = {**entry['model_args'], 'channels': [8192] * 3}
    save_file(tensors, tmp_path / 'm.safetensors', metadata={'timm_lean': json.dumps(entry)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r'do not fit|the file is damaged'):
        load_model(tmp_path / 'm.safetensors')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_a_mask_without_kernels_is_no_bomb():
    """31 x 31 kernels, all dead: 1 bit against 3,844 bytes each."""
    stored = {'w::kernels': (0, 31, 31), 'w::mask': (8192 * 8192 // 8,)}
    with pytest.raises(CheckpointError, match='claims 64,491,618,304 entries'):
        packed_shapes(stored, {'w': [8192, 8192, 31, 31]})
