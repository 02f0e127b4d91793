"""Physical removal: the outputs stay, the size goes, and the result is a timm model that saves and loads."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomize_batchnorm

from timm_lean import LeanError, load_model, save_model
from timm_lean.checkpoint.format import save_hf_dir
from timm_lean.layers import SharedBasisConv2d
from timm_lean.pruning import compact, prune_kernels


def image(name: str) -> torch.Tensor:
    size = 32 if 'cifar' in name else 64
    return torch.randn(2, 3, size, size)


def with_dead_filters(name: str, **kwargs) -> nn.Module:
    """Half the filters of every dense convolution make nothing, and half the kernels of the others are zero."""
    model = randomize_batchnorm(timm.create_model(name, **kwargs)).eval()
    model = prune_kernels(model, criterion='spectral_norm', amount=0.5)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d) and m.groups == 1:
                m.weight[::2] = 0
    return model


FAST = ['resnet20_cifar', 'mobilenetv3_small_050']
SLOW = ['resnet18', 'mobilenetv2_035', 'regnetx_002', 'densenet121', 'efficientnet_b0', 'resnet34', 'resnet50', 'dla34',
        'repvgg_a0', 'hrnet_w18_small', 'xception41', 'fbnetc_100', 'resnetv2_50', 'cspresnet50', 'seresnet50',
        'selecsls42b', 'convnext_atto']


@pytest.mark.parametrize('name', [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_outputs_stay_and_files_reload(name, tmp_path):
    model, x = with_dead_filters(name), image(name)
    before = copy.deepcopy(model.state_dict())
    expected = model(x)
    small = compact(model, x)
    report = small.lean_report
    torch.testing.assert_close(small(x), expected, rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max()))
    assert report.params[1] < report.params[0] or name == 'convnext_atto'
    assert report.change < 1e-4 * report.scale
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), 'the given model is unchanged'
    save_model(small, tmp_path / 'm.safetensors')
    assert torch.equal(load_model(tmp_path / 'm.safetensors')(x), small(x))


def test_a_block_by_hand():
    """Filters 0 (read by nobody), 1 (dead, BN shift below zero: ReLU gives 0), 2 (dead, shift above zero) of conv1."""
    model = randomize_batchnorm(timm.create_model('resnet20_cifar')).eval()
    block, x = model.layer1[0], torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        block.conv2.weight[:, 0] = 0
        block.conv1.weight[1:3] = 0
        for channel, sign in ((1, -1), (2, 1)):
            block.bn1.running_mean[channel] = 0
            block.bn1.bias[channel] = 0.3 * sign
    expected = model(x)
    small = compact(model, x)
    assert small.lean_report.removed == (('layer1.0.conv1', 2),), 'a constant map under a zero-padded 3 x 3 stays'
    assert small.lean_report.left == 1
    assert small.layer1[0].conv1.weight.shape == (14, 16, 3, 3)
    assert small.layer1[0].conv2.weight.shape == (16, 14, 3, 3)
    assert torch.equal(small.layer1[0].conv2.weight, block.conv2.weight[:, 2:])
    torch.testing.assert_close(small(x), expected)


def test_constants_behind_1x1_convolutions_are_moved_exactly():
    """The last 3 x 3 of a bottleneck makes a constant that its 1 x 1 reads; it becomes a bias."""
    model = randomize_batchnorm(timm.create_model('resnet26')).eval()
    block, x = model.layer2[0], torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        block.conv2.weight[5] = 0
        block.bn2.running_mean[5], block.bn2.bias[5] = 0, 0.7
    expected = model(x)
    small = compact(model, x)
    assert small.lean_report.removed == (('layer2.0.conv2', 1),)
    assert small.lean_report.constants == 1
    torch.testing.assert_close(small.layer2[0].conv3.bias, 0.7 * block.conv3.weight[:, 5, 0, 0])
    torch.testing.assert_close(small(x), expected)


def test_nothing_dead_nothing_changed():
    model = randomize_batchnorm(timm.create_model('resnet20_cifar')).eval()
    small = compact(model, torch.randn(1, 3, 32, 32))
    assert small.lean_report.removed == ()
    assert small.lean_report.change == 0
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), small.state_dict().values(), strict=True))
    assert not getattr(small, 'lean_steps', [])


def test_a_dead_layer_keeps_one_channel():
    model = randomize_batchnorm(timm.create_model('resnet20_cifar')).eval()
    with torch.no_grad():
        model.layer1[0].conv1.weight.zero_()
        model.layer1[0].bn1.bias.fill_(-1)
        model.layer1[0].bn1.running_mean.zero_()
    x = torch.randn(1, 3, 32, 32)
    small = compact(model, x)
    assert small.layer1[0].conv1.weight.shape == (1, 16, 3, 3)
    torch.testing.assert_close(small(x), model(x))


def test_shared_bases_stay_shared(tmp_path):
    model = randomize_batchnorm(timm.create_model('resnet34_s32u1')).eval()
    model = prune_kernels(model, criterion='weight', amount=0.2)
    basis = model.layer1[1].conv1.basis
    with torch.no_grad():  # nothing in the stage reads channels 0..7
        basis.weight[:, :8] = 0
        for m in model.modules():
            if isinstance(m, SharedBasisConv2d) and m.in_channels == 64:
                m.unique.weight[:, :8] = 0
        model.layer1[0].conv1.weight[:, :8] = 0
        model.layer2[0].conv1.weight[:, :8] = 0
        model.layer2[0].downsample[0].weight[:, :8] = 0
    x = torch.randn(1, 3, 64, 64)
    small = compact(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    bases = {id(m.basis) for m in small.layer1.modules() if isinstance(m, SharedBasisConv2d)}
    assert len(bases) == 1
    assert small.layer1[1].conv1.basis.weight.shape[1] == 56
    save_model(small, tmp_path / 'm.safetensors')
    loaded = load_model(tmp_path / 'm.safetensors')
    assert torch.equal(loaded(x), small(x))
    assert len({id(m.basis) for m in loaded.layer1.modules() if isinstance(m, SharedBasisConv2d)}) == 1


def test_the_result_is_a_timm_model(tmp_path):
    model, x = with_dead_filters('resnet18', num_classes=7), image('resnet18')
    small = compact(model, x)
    save_hf_dir(small, tmp_path / 'hf')
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}/hf', pretrained=True).eval()(x), small(x))
    features = timm.create_model(f'local-dir:{tmp_path}/hf', pretrained=True, features_only=True).eval()
    assert [f.shape[1] for f in features(x)] == features.feature_info.channels()
    assert compact(small, x).lean_report.removed == ()
    small.train()
    small(x).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters())
    torch.testing.assert_close(torch.fx.symbolic_trace(small.eval())(x), small(x))


def test_training_mode_is_refused():
    with pytest.raises(LeanError, match='eval mode'):
        compact(timm.create_model('resnet20_cifar').train(), torch.randn(1, 3, 32, 32))


def test_a_network_of_no_toolkit():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight[1].zero_()
        model[0].bias[1] = 0.
    x = torch.randn(1, 3, 8, 8)
    new = compact(model, x)
    assert new[0].out_channels == new[2].in_channels == 3
    torch.testing.assert_close(new(x), model(x))
