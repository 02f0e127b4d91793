"""Removing residual blocks: which can go, which go first, and that the result is a network like any other."""
import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomize_batchnorm

from timm_lean import LeanError, load_model, save_model
from timm_lean.pruning import blocks, prune_channels, remove_blocks
from timm_lean.pruning.blocks import find_blocks

X = nn.functional.interpolate(torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(0)), size=32)


def network():
    torch.manual_seed(0)
    return randomize_batchnorm(timm.create_model('resnet20_cifar')).eval()


def error(model, original, x):
    with torch.no_grad():
        y = original(x)
        return float((model(x) - y).norm() / y.norm())


@pytest.mark.parametrize('name, blocks', [
    ('resnet20_cifar', ['layer1.0', 'layer1.1', 'layer1.2', 'layer2.1', 'layer2.2', 'layer3.1', 'layer3.2']),
    ('regnetx_002', [*(f's3.b{i}' for i in (2, 3, 4)), *(f's4.b{i}' for i in range(2, 8))]),
    ('test_convnext', ['stages.0.blocks.0', *(f'stages.{s}.blocks.{b}' for s, n in ((1, 2), (2, 4), (3, 2))
                                              for b in range(n))]),
    ('mobilenetv3_small_050', ['blocks.1.1', 'blocks.2.1', 'blocks.2.2', 'blocks.3.0', 'blocks.3.1', 'blocks.4.1',
                               'blocks.4.2'])])
def test_blocks_that_can_go(name, blocks):
    model = timm.create_model(name)
    assert find_blocks(model, torch.zeros(1, 3, 32, 32)) == blocks
    assert model.training


def test_the_block_that_does_nothing_goes_first_and_calibration_helps():
    original = network()
    with torch.no_grad():
        original.layer2[1].bn2.weight.zero_()
        original.layer2[1].bn2.bias.zero_()  # relu(x + 0) of an x that is the output of a relu
    new = remove_blocks(original, count=2, calibration=[X])
    report = new.lean_report
    assert report.removed[0] == ('layer2.1', 0., 0.) and report.removed[1][1] > 0
    assert report.params[1] < report.params[0] and report.macs[1] < report.macs[0] and min(report.latency_ms) > 0
    assert 'layer2.1' in str(report) and report.to_dict()['removed'][0][0] == 'layer2.1'
    plain = remove_blocks(original, blocks=[name for name, *_ in report.removed])
    assert plain.lean_report.removed[0] == ('layer2.1', None, None)
    held = X[3::4]
    assert error(new, original, held) < error(plain, original, held)
    assert isinstance(plain.layer2[1], nn.Identity) and not isinstance(original.layer2[1], nn.Identity)


def test_processes_with_images_of_their_own_rank_as_one_with_all(monkeypatch):
    model = timm.create_model('resnet20_cifar').eval()
    names, images, own = find_blocks(model, torch.zeros(1, 3, 32, 32)), torch.randn(12, 3, 32, 32), []
    whole = blocks._effects(model, model, names, images)
    monkeypatch.setattr(blocks, 'all_reduce', lambda tensors: own.append(tensors[0].clone()))
    blocks._effects(model, model, names, images[:4])
    monkeypatch.setattr(blocks, 'all_reduce', lambda tensors: tensors[0].add_(own[0]))
    for (name, *ours), (expected, *theirs) in zip(
            blocks._effects(model, model, names, images[4:]), whole, strict=True):
        assert name == expected and ours == pytest.approx(theirs, rel=1e-5)


def test_a_checkpoint_rebuilds_it(tmp_path):
    new = prune_channels(remove_blocks(network(), blocks=['layer2.1', 'layer3.2']), X[:1], round_to=4)
    save_model(new, tmp_path / 'm.safetensors')
    again = load_model(tmp_path / 'm.safetensors').eval()
    with torch.no_grad():
        assert torch.equal(again(X), new.eval()(X))
    assert [step['op'] for step in again.lean_steps] == ['remove_blocks', 'resize']
    features = load_model(tmp_path / 'm.safetensors', features_only=True).eval()
    with torch.no_grad():
        assert [f.shape[-1] for f in features(X)] == [32, 32, 16, 8]


def test_blocks_that_are_given_more_than_their_input(tmp_path):
    """DLA's blocks take a shortcut and children beside it; without the block the input goes on."""
    model = timm.create_model('dla34', num_classes=4).eval()
    x, given = torch.randn(1, 3, 64, 64), {}
    for name in find_blocks(model, x):
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: given.update({name: len(args)}))
    model(x)
    name = next(name for name, count in given.items() if count > 1)
    new = remove_blocks(model, blocks=[name])
    seen = []
    new.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(out is args[0]))
    y = new(x)
    assert seen == [True]
    save_model(new, tmp_path / 'new.safetensors')
    assert torch.equal(load_model(tmp_path / 'new.safetensors').eval()(x), y)


def test_ratio_and_patterns():
    new = remove_blocks(network(), ratio=0.5, include='layer[12].*', exclude='layer1.0', calibration=[X[:8]])
    names = {name for name, *_ in new.lean_report.removed}
    assert len(names) == 2 and names <= {'layer1.1', 'layer1.2', 'layer2.1', 'layer2.2'}


@pytest.mark.parametrize('arguments, message', [
    ({}, 'exactly one of count, blocks and ratio'), ({'count': 1, 'ratio': 0.5}, 'exactly one'),
    ({'count': 1}, 'needs calibration=LOADER'), ({'blocks': ['layer2.0']}, "no removable block 'layer2.0'"),
    ({'blocks': ['layer2.1', 'layer2.1']}, 'twice'), ({'blocks': []}, 'at least one'),
    ({'count': 8, 'calibration': [X]}, 'has 7 blocks that could go, got 8'),
    ({'ratio': 1.5, 'calibration': [X]}, 'ratio must be'), ({'count': 1, 'calibration': []}, 'no calibration images'),
    ({'blocks': ['layer2.1'], 'exclude': 'nothing'}, 'matches no removable block')])
def test_bad_arguments(arguments, message):
    with pytest.raises(LeanError, match=message):
        remove_blocks(network(), **arguments)


def test_networks_without_blocks():
    with pytest.raises(LeanError, match='no residual block'):
        remove_blocks(timm.create_model('vgg11'), blocks=['features.0'])


@pytest.mark.parametrize('verb', [
    blocks.rank_blocks, lambda model, x: remove_blocks(model, count=1, calibration=[x])], ids=['rank', 'remove'])
def test_too_little_memory_to_rank(verb):
    def full(module, args):
        if len(args[0]) > 1:  # one image alone finds the blocks
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')
    model = network()
    model.conv1.register_forward_pre_hook(full)
    with pytest.raises(LeanError, match=r'Ranking blocks by 24 images \[3, 32, 32\] ran out of memory: give fewer'):
        verb(model, X)
