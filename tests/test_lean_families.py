"""The families with free depth and width: their sizes, their arguments, their checkpoints.

What every model of this package must do is in test_models.py, which runs their default members.
"""
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import Bottleneck

from timm_lean import fold, load_model, save_model
from timm_lean.checkpoint.recipe import recipe_of
from timm_lean.errors import LeanError
from timm_lean.layers import SharedBasisConv2d

FAMILIES = {
    'lean_resnet': dict(layers=[2, 1], widths=[12, 20]),
    'lean_resnext': dict(layers=[1, 2], widths=[32, 64], cardinality=4),
    'lean_shared_resnet': dict(layers=[2, 3], widths=[16, 24], shared_rank=8, unique_rank=1, dual=True),
    'lean_densenet': dict(layers=[2, 3], growth=6),
    'lean_efficientnet': dict(layers=[1, 2], widths=[8, 16]),
    'lean_mobilenetv2': dict(layers=[1, 2], widths=[8, 16]),
}


def params(name: str, **kwargs) -> int:
    with torch.device('meta'):
        return sum(p.numel() for p in timm.create_model(name, **kwargs).parameters())


def test_defaults_are_published_networks():
    assert params('lean_resnet') == 269_722 + 16 * 32 + 32 * 64 + 2 * 32 + 2 * 64  # ResNet-20, 1 x 1 shortcuts
    big = dict(stem_stride=4, num_classes=1000)
    assert params('lean_resnet', layers=(3, 4, 6, 3), widths=(64, 128, 256, 512), **big) == params('resnet34')
    assert params('lean_resnext', layers=(3, 4, 6, 3), widths=(256, 512, 1024, 2048), cardinality=32, stem_width=64,
                  **big) == params('resnext50_32x4d')
    assert params('lean_densenet', layers=(6, 12, 24, 16), growth=32, **big) == params('densenet121')
    shared = dict(layers=(3, 4, 6, 3), widths=(64, 128, 256, 512), shared_rank=48, unique_rank=1, dual=True)
    assert params('lean_shared_resnet', **shared, **big) == params('resnet34_s48u1_dual')


def test_resnet34_computes_what_timms_does():
    torch.manual_seed(0)
    reference = timm.create_model('resnet34', num_classes=10).eval()
    model = timm.create_model(
        'lean_resnet', layers=(3, 4, 6, 3), widths=(64, 128, 256, 512), stem_stride=4, num_classes=10).eval()
    model.load_state_dict(reference.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), reference(x))


@pytest.mark.parametrize('name, kwargs', FAMILIES.items())
def test_members_run_at_any_stem(name, kwargs):
    for stride in (1, 2, 4):
        model = timm.create_model(name, **kwargs, stem_stride=stride, num_classes=5).eval()
        x = torch.randn(2, 3, 32, 32)
        assert model(x).shape == (2, 5)
        features = timm.create_model(name, **kwargs, stem_stride=stride, features_only=True).eval()
        assert features.feature_info.reduction() == [min(stride, 2), stride, 2 * stride]
        assert [f.shape[1] for f in features(x)] == features.feature_info.channels()
        assert [32 // f.shape[-1] for f in features(x)] == features.feature_info.reduction()


@pytest.mark.parametrize('name, kwargs', FAMILIES.items())
def test_checkpoint_rebuilds_the_member(name, kwargs, tmp_path: Path):
    model = timm.create_model(name, **kwargs, num_classes=7).eval()
    assert recipe_of(model).architecture == name
    save_model(model, tmp_path / 'm.safetensors')
    loaded = load_model(tmp_path / 'm.safetensors')
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize('name, kwargs', FAMILIES.items())
@pytest.mark.parametrize('stages', [1, 5])
def test_one_to_five_stages(name, kwargs, stages):
    kwargs = {k: (v[:1] * stages if isinstance(v, list) else v) for k, v in kwargs.items()}
    if 'shared_rank' in kwargs:
        kwargs.update(shared_rank=2)
    model = timm.create_model(name, **kwargs).eval()
    assert len(model.stages()) == stages
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize('width, cardinality', [(32, 8), (96, 8), (240, 12), (480, 8), (1984, 32), (4096, 32)])
def test_resnext_blocks_have_the_inner_width_asked_for(width, cardinality):
    with torch.device('meta'):
        model = timm.create_model('lean_resnext', layers=(1,), widths=(width,), cardinality=cardinality)
    block = model.layer1[0]
    assert isinstance(block, Bottleneck)
    assert (block.conv2.out_channels, block.conv2.groups) == (width // 2, cardinality)
    assert block.conv3.out_channels == width


def test_shared_member_folds():
    model = timm.create_model('lean_shared_resnet', **FAMILIES['lean_shared_resnet']).eval()
    assert sum(isinstance(m, SharedBasisConv2d) for m in model.modules()) == 2 * (1 + 2)
    folded = fold(model)
    assert not any(isinstance(m, SharedBasisConv2d) for m in folded.modules())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name, kwargs, words', [
    ('lean_resnet', dict(layers=(1, 2), widths=(8,)), r'widths=\[8\] has 1 entries for the 2 stages'),
    ('lean_resnet', dict(layers=(1, 0), widths=(8, 8)), r'layers must .* \(1, 0\)'),
    ('lean_resnet', dict(layers=(1,) * 6, widths=(8,) * 6), '1 to 5 stages'),
    ('lean_resnet', dict(layers=(1,), widths=(8.5,)), '8.5'),
    ('lean_resnet', dict(layers=3), 'layers must list'),
    ('lean_resnet', dict(stem_stride=3), 'stem_stride must be 1, 2 or 4, got 3'),
    ('lean_resnet', dict(shared_rank=100000, unique_rank=1), 'shared_rank'),
    ('lean_resnext', dict(layers=(1,), widths=(36,), cardinality=8), 'width 36'),
    ('lean_resnext', dict(shared_rank=4), 'basic blocks'),
    ('lean_densenet', dict(growth=0), 'growth'),
    ('lean_mobilenetv2', dict(act='gelu'), "'gelu'"),
])
def test_members_that_cannot_be(name, kwargs, words):
    with torch.device('meta'), pytest.raises(LeanError, match=words):
        timm.create_model(name, **kwargs)


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('name, kwargs', [
    *FAMILIES.items(), ('resnet20_cifar', {}), ('resnet32_cifar_s8u1', dict(layers=(2, 2, 2)))])
def test_the_feature_getter_can_be_scripted(name, kwargs):
    """As that of timm's densenet, efficientnet and mobilenetv2 can."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, 32, 32)
    for out_indices in ((0, 1, 2), (1,)):
        model = timm.create_model(
            name, **kwargs, features_only=True, feature_cls='getter', out_indices=out_indices, scriptable=True).eval()
        expected = model(x)
        assert len(expected) == len(out_indices)
        for scripted, feature in zip(torch.jit.script(model)(x), expected, strict=True):
            torch.testing.assert_close(scripted, feature)


# --- the authors' own variants (docs/shared_bases.md) -----------------------------------------------------------------

@pytest.mark.parametrize('name', ['mobilenetv2_100_shared', 'mobilenetv2_cifar_sharedpp'])
def test_mobilenetv2_blocks_may_have_relu_as_the_authors_have(name, tmp_path):
    """Stem and head keep ReLU6; a block is x -> 1 x 1, BN, ReLU, 3 x 3 depthwise, BN, ReLU, 1 x 1, BN, + x."""
    model = timm.create_model(name, block_act_layer='relu', num_classes=3).eval()
    assert all(type(act) is torch.nn.ReLU6 for act in (model.bn1.act, model.bn2.act))
    block, x = model.blocks[2][1], 20 * torch.randn(1, 32, 8, 8)
    hidden = F.relu(F.batch_norm(block.conv_pw(x), *bn_arguments(block.bn1)))
    hidden = F.relu(F.batch_norm(block.conv_dw(hidden), *bn_arguments(block.bn2)))
    assert hidden.max() > 6
    torch.testing.assert_close(block(x), block.bn3(block.conv_pwl(hidden)) + x)
    save_model(model, tmp_path / 'a.safetensors')
    image = 20 * torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(load_model(tmp_path / 'a.safetensors')(image), model(image))
    standard = timm.create_model(name, num_classes=3).eval()
    standard.load_state_dict(model.state_dict())
    assert not torch.allclose(standard(image), model(image))


def bn_arguments(bn):
    return bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0., bn.eps


def test_densenet_transitions_may_lack_the_relu_as_the_authors_do():
    model = timm.create_model('densenet121_cifar_s64u4', layers=(2, 2), growth=16, transition_act=False).eval()
    transition, x = model.layer2[0], torch.randn(1, 64, 8, 8)
    expected = F.avg_pool2d(F.conv2d(F.batch_norm(x, *bn_arguments(transition.norm)), transition.conv.weight), 2)
    torch.testing.assert_close(transition(x), expected)
    standard = timm.create_model('densenet121_cifar_s64u4', layers=(2, 2), growth=16).eval()
    standard.load_state_dict(model.state_dict())
    assert not torch.allclose(standard.layer2[0](x), expected)


@pytest.mark.parametrize('name, kwargs', [
    ('resnet34_s32u1_dual', {}), ('resnet32_cifar_s16u1_dual', {}), ('lean_shared_resnet', dict(dual=True))])
def test_dual_bases_of_a_stage_start_jointly_orthonormal(name, kwargs):
    block = timm.create_model(name, **kwargs).layer2[1]
    rows = torch.cat([conv.basis.weight.flatten(1) for conv in (block.conv1, block.conv2)])
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)
