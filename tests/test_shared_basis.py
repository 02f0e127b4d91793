"""A basis is one tensor, whatever is done to its model; the layer, its initialization, and folding it away."""
import copy
import pickle

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import randomize_batchnorm
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from timm.layers import BatchNormAct2d
from timm.utils import ModelEmaV3, reparameterize_model

from timm_lean import fold
from timm_lean.errors import LeanError
from timm_lean.layers import FilterBasis, SharedBasisConv2d, init_orthonormal

FAMILIES = ('resnet34_s48u1_dual', 'resnet50_shared', 'resnet50_sharedpp', 'mobilenetv2_100_shared',
            'mobilenetv2_100_sharedpp', 'resnet32_cifar_s8u1', 'resnet32_cifar_s16u1_dual', 'resnet34_cifar_s8u1')


def small(**kwargs) -> nn.Module:
    """A thin CIFAR ResNet: 3 stages, 2 sharing blocks in each, so every basis serves 2 (dual) or 4 convolutions."""
    model = timm.create_model('resnet20_cifar', **dict(dict(shared_rank=8, unique_rank=1, dual=True), **kwargs))
    return randomize_batchnorm(model).eval()


def shared_layers(model: nn.Module) -> list[SharedBasisConv2d]:
    return [m for m in model.modules() if isinstance(m, SharedBasisConv2d)]


def assert_each_basis_is_one_tensor(model: nn.Module, count: int) -> None:
    """As the layers use them, as parameters, and as entries of the state dict; and all of it the same tensors."""
    used = {id(layer.basis.weight) for layer in shared_layers(model)}
    listed = {id(p): k for k, p in model.named_parameters() if '.basis.' in k}
    written = [k for k in model.state_dict() if '.basis.' in k]
    assert len(used) == len(listed) == len(written) == count
    assert used == listed.keys()
    assert sorted(written) == sorted(listed.values())
    pointers = {p.data_ptr() for p in model.parameters()}
    assert len(pointers) == len(list(model.parameters()))


def assert_fold_is_exact(folded: nn.Module, model: nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        expected, out = model(x), folded(x)
    assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()


# --- one tensor -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, count', [
    ('resnet34_s48u1_dual', 8), ('resnet50_shared', 4), ('resnet50_sharedpp', 8), ('mobilenetv2_100_shared', 4),
    ('mobilenetv2_100_sharedpp', 8), ('resnet32_cifar_s8u1', 3), ('resnet32_cifar_s16u1_dual', 6),
    ('resnet34_cifar_s8u1', 4)])
def test_a_basis_is_one_tensor(name, count):
    assert_each_basis_is_one_tensor(timm.create_model(name), count)


@pytest.mark.parametrize('dual, users', [(True, 2), (False, 4)])
def test_a_basis_serves_its_stage_and_kind_only(dual, users):
    model = small(dual=dual)
    for name, layer in model.named_modules():
        if isinstance(layer, SharedBasisConv2d):
            stage, _, kind = name.split('.')
            same = [n for n, other in model.named_modules()
                    if isinstance(other, SharedBasisConv2d) and other.basis is layer.basis]
            assert len(same) == users
            assert all(n.startswith(stage) and (n.endswith(kind) or not dual) for n in same)


def test_save_file_takes_the_plain_state_dict(tmp_path):
    model = small()
    save_file(model.state_dict(), tmp_path / 'm.safetensors')
    tensors = load_file(tmp_path / 'm.safetensors')
    assert sum(k.endswith('basis.weight') for k in tensors) == 6
    other = small()
    other.load_state_dict(tensors)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    assert_each_basis_is_one_tensor(other, 6)


@pytest.mark.parametrize('dual', [True, False])
def test_every_layer_of_the_group_trains_the_basis(dual, device):
    model = small(dual=dual).to(device, torch.float64)
    unshared = copy.deepcopy(model)
    for layer in shared_layers(unshared):
        layer.basis = copy.deepcopy(layer.basis)
    x, target = torch.randn(4, 3, 16, 16, dtype=torch.float64, device=device), torch.arange(4, device=device)
    F.cross_entropy(model(x), target).backward()
    F.cross_entropy(unshared(x), target).backward()
    parts: dict[int, list[torch.Tensor]] = {}
    for layer, alone in zip(shared_layers(model), shared_layers(unshared), strict=True):
        assert alone.basis.weight.grad.abs().max() > 0
        parts.setdefault(id(layer.basis), []).append(alone.basis.weight.grad)
    for layer in shared_layers(model):
        assert len(parts[id(layer.basis)]) == (2 if dual else 4)
        torch.testing.assert_close(layer.basis.weight.grad, sum(parts[id(layer.basis)]), rtol=1e-9, atol=1e-12)


def _ema(model):
    ema = ModelEmaV3(model, decay=0.5)
    ema.update(model)
    return ema.module


def _assigned(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return model


def _loaded(model):
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    return model


def _from_meta(model):
    with torch.device('meta'):
        new = small()
    new.to_empty(device='cpu')
    new.load_state_dict(model.state_dict())
    return new.eval()


def _through_meta(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.to('meta').to_empty(device='cpu')
    model.load_state_dict(state)
    return model


def _assigned_to_meta(model):
    with torch.device('meta'):
        new = small()
    new.load_state_dict(model.state_dict(), assign=True)
    return new.eval()


@pytest.mark.parametrize('change', [
    copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _ema, _loaded, _assigned, _from_meta,
    _assigned_to_meta, lambda m: m.double().float(), lambda m: m.to(memory_format=torch.channels_last),
    _through_meta, lambda m: copy.deepcopy(_loaded(m)), lambda m: pickle.loads(pickle.dumps(_loaded(m))),
], ids=['deepcopy', 'pickle', 'ema', 'load', 'assign', 'meta_to_empty', 'meta_assign', 'dtype', 'channels_last',
        'through_meta', 'deepcopy_after_load', 'pickle_after_load'])
def test_a_basis_is_still_one_tensor_after(change):
    torch.manual_seed(0)
    model = small()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    torch.manual_seed(0)
    new = change(model)
    assert_each_basis_is_one_tensor(new, 6)
    torch.testing.assert_close(new(x), expected)


def test_an_optimizer_step_moves_every_layer_of_the_group(device):
    model = small().to(device)
    before = model.layer1[1].conv1.basis.weight.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(torch.randn(2, 3, 32, 32, device=device)), torch.arange(2, device=device)).backward()
    optimizer.step()
    for block in list(model.layer1)[1:]:
        assert not torch.equal(block.conv1.basis.weight, before)
    assert model.layer1[1].conv1.basis.weight is model.layer1[2].conv1.basis.weight


# --- state dicts ------------------------------------------------------------------------------------------------------

def test_the_first_layer_of_a_group_writes_the_basis():
    keys = [k for k in small().state_dict() if 'basis' in k]
    assert keys == [f'layer{s}.1.conv{c}.basis.weight' for s in (1, 2, 3) for c in (1, 2)]


def test_a_submodule_without_the_first_owner_is_saved_complete_and_loads():
    model, other = small(), small()
    state = model.layer1[2].state_dict()
    assert {'conv1.basis.weight', 'conv2.basis.weight'} <= state.keys()
    other.layer1[2].load_state_dict(state)
    torch.testing.assert_close(other.layer1[2].conv1.basis.weight, model.layer1[2].conv1.basis.weight, rtol=0, atol=0)
    assert_each_basis_is_one_tensor(other, 6)


def test_a_single_layer_is_saved_complete():
    assert list(small().layer1[2].conv2.state_dict())[:2] == ['unique.weight', 'basis.weight']


def test_state_dicts_into_one_destination_hold_each_basis_once():
    model = small()
    destination: dict = {}
    for i, block in enumerate(model.layer1):
        block.state_dict(destination=destination, prefix=f'{i}.')
    assert [k for k in destination if 'basis' in k] == ['1.conv1.basis.weight', '1.conv2.basis.weight']


def test_keep_vars_writes_each_basis_once_and_with_its_graph():
    state = small().state_dict(keep_vars=True)
    assert sum('basis' in k for k in state) == 6
    assert all(state[k].requires_grad for k in state if 'basis' in k)


def test_two_models_in_one_state_dict_keep_their_own_bases():
    assert sum('basis' in k for k in nn.ModuleList([small(), small()]).state_dict()) == 12


def test_a_missing_basis_is_reported_once():
    model = small()
    state = model.state_dict()
    del state['layer2.1.conv1.basis.weight']
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ['layer2.1.conv1.basis.weight']
    with pytest.raises(RuntimeError, match=r'Missing key.*layer2\.1\.conv1\.basis\.weight'):
        model.load_state_dict(state)


def test_every_load_reports_what_is_missing_in_it():
    model = small()
    full = model.state_dict()
    part = {k: v for k, v in full.items() if k != 'layer1.1.conv2.basis.weight'}
    for state, missing in ((full, []), (part, ['layer1.1.conv2.basis.weight']), (full, []), *[
            (part, ['layer1.1.conv2.basis.weight'])] * 3):
        assert model.load_state_dict(state, strict=False).missing_keys == missing


def test_a_deepcopied_model_reports_what_is_missing():
    model = small()
    state = model.state_dict()
    model.load_state_dict(state)
    del state['layer1.1.conv2.basis.weight']
    assert copy.deepcopy(model).load_state_dict(state, strict=False).missing_keys == ['layer1.1.conv2.basis.weight']


def test_an_unexpected_basis_is_reported():
    model = small()
    state = {**model.state_dict(), 'layer1.0.conv1.basis.weight': torch.zeros(1)}
    assert model.load_state_dict(state, strict=False).unexpected_keys == ['layer1.0.conv1.basis.weight']


def test_a_basis_of_another_shape_is_an_error():
    model = small()
    state = model.state_dict()
    state['layer1.1.conv1.basis.weight'] = torch.zeros(3, 16, 3, 3)
    with pytest.raises(RuntimeError, match=r'size mismatch for layer1\.1\.conv1\.basis\.weight'):
        model.load_state_dict(state)


def test_a_dense_checkpoint_is_refused():
    with pytest.raises(RuntimeError, match='Missing key'):
        small().load_state_dict(timm.create_model('resnet20_cifar').state_dict())


# --- the layer --------------------------------------------------------------------------------------------------------

def layer_of(
        in_chs, out_chs, kernel, shared, unique, stride=1, groups=1, unique_groups=None, coefficients=True, bn=True):
    basis = FilterBasis(shared, in_chs, kernel, groups=groups) if shared else None
    layer = SharedBasisConv2d(
        in_chs, out_chs, kernel, basis, unique, stride=stride, unique_groups=unique_groups, coefficients=coefficients,
        norm_layer=nn.BatchNorm2d if bn else None)
    return randomize_batchnorm(layer).double().eval()


def naive(layer: SharedBasisConv2d, x: torch.Tensor) -> torch.Tensor:
    """Two convolutions, their responses concatenated, then BN and coefficients: the definition."""
    maps = [
        F.conv2d(x, bank.weight, stride=layer.stride, padding=bank.weight.shape[-1] // 2, groups=bank.groups)
        for bank in (layer.unique, layer.basis) if bank is not None]
    groups = {bank.groups for bank in (layer.unique, layer.basis) if bank is not None}
    if len(groups) == 1:  # unique before shared within each group
        maps = [torch.cat(parts, 1) for parts in zip(*(m.chunk(*groups, 1) for m in maps), strict=True)]
    return layer.coeff(layer.bn(torch.cat(maps, 1)))


def layers():
    """Layers over channels, ranks, kernels, strides and groups, those of the unique filters different too."""
    @st.composite
    def draw_layer(draw):
        groups, unique_groups = draw(st.sampled_from((1, 2, 4))), draw(st.sampled_from((None, 1, 2, 4)))
        in_chs = 4 * draw(st.integers(1, 3))
        shared = draw(st.integers(0, 3)) * groups
        # without a basis, the layer's own filters are ungrouped unless they say otherwise
        unique = draw(st.integers(0, 3)) * (unique_groups or (groups if shared else 1))
        assume(shared + unique > 0)
        coefficients = draw(st.booleans())
        return layer_of(
            in_chs, draw(st.integers(1, 9)) if coefficients else shared + unique, draw(st.sampled_from((1, 3, 5))),
            shared, unique, stride=draw(st.sampled_from((1, 2))), groups=groups, unique_groups=unique_groups,
            coefficients=coefficients, bn=draw(st.booleans()))
    return draw_layer()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layer=layers(), size=st.integers(5, 9))
def test_one_convolution_is_two_with_concatenated_responses(layer, size):
    x = torch.randn(2, layer.in_channels, size, size, dtype=torch.float64)
    torch.testing.assert_close(layer(x), naive(layer, x))
    torch.testing.assert_close(layer.train()(x), naive(layer, x))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layer=layers(), size=st.integers(5, 9))
def test_dense_weight_and_bias_compute_the_layer(layer, size):
    weight, bias, groups = layer.dense_weight_bias()
    x = torch.randn(2, layer.in_channels, size, size, dtype=torch.float64)
    out = F.conv2d(x, weight, bias, layer.stride, layer.padding, groups=groups)
    torch.testing.assert_close(out, layer(x), rtol=1e-9, atol=1e-9)
    assert not weight.requires_grad


@settings(max_examples=40, deadline=None, derandomize=True)
@given(layer=layers())
def test_fold_replaces_a_layer_anywhere(layer):
    model = nn.Sequential(layer, nn.ReLU()).eval()
    x = torch.randn(2, layer.in_channels, 7, 7, dtype=torch.float64)
    folded = fold(model)
    assert type(folded[0]) is nn.Conv2d
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)


def test_output_size_is_rounded_up_by_stride():
    assert layer_of(4, 6, 3, 2, 1, stride=2)(torch.randn(1, 4, 7, 9).double()).shape == (1, 6, 4, 5)


def test_a_grouped_shared_convolution_stays_grouped_when_dense():
    weight, bias, groups = layer_of(8, 4, 3, 4, 0, groups=4, coefficients=False, bn=False).dense_weight_bias()
    assert groups == 4
    assert weight.shape == (4, 2, 3, 3)
    assert bias is None


def test_gradients_reach_both_banks_and_the_coefficients():
    layer = layer_of(4, 6, 3, 3, 2).train()
    layer(torch.randn(2, 4, 5, 5).double()).square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert all(p.grad.abs().max() > 0 for p in (layer.unique.weight, layer.basis.weight, layer.coeff.weight))


@pytest.mark.parametrize('make, words', [
    (lambda: SharedBasisConv2d(4, 4, 3), 'both 0'),
    (lambda: SharedBasisConv2d(4, 4, 3, FilterBasis(3, 4, 3), coefficients=False), '3 filters must equal.*=4'),
    (lambda: SharedBasisConv2d(4, 4, 3, FilterBasis(3, 8, 3)), '8 channels.*the layer for 4'),
    (lambda: SharedBasisConv2d(4, 4, 3, FilterBasis(3, 4, 5)), '5 x 5.*3 x 3'),
    (lambda: FilterBasis(4, 6, 3, groups=4), 'in_channels=6.*groups=4'),
    (lambda: FilterBasis(3, 8, 3, groups=4), 'num_filters=3.*groups=4'),
])
def test_layers_that_do_not_fit_are_errors(make, words):
    with pytest.raises(LeanError, match=words):
        make()


# --- initialization ---------------------------------------------------------------------------------------------------

def rows(*banks: FilterBasis) -> torch.Tensor:
    return torch.cat([b.weight.detach().flatten(1) for b in banks]).double()


def assert_identity(gram: torch.Tensor) -> None:
    torch.testing.assert_close(gram, torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize('name', [
    'resnet34_s48u1_dual', 'resnet34_s32u1', 'resnet50_shared', 'resnet32_cifar_s16u1_dual', 'resnet34_cifar_s32u1'])
def test_bases_start_orthonormal(name):
    for layer in shared_layers(timm.create_model(name)):
        r = rows(layer.basis)
        assert_identity(r @ r.T)


@pytest.mark.parametrize('name', ['resnet32_cifar_s16u1_dual', 'resnet56_cifar_s16u1_dual'])
def test_dual_bases_of_the_thin_cifar_networks_start_orthonormal_jointly(name):
    model = timm.create_model(name)
    for stage in (model.layer1, model.layer2, model.layer3):
        r = rows(stage[1].conv1.basis, stage[1].conv2.basis)
        assert_identity(r @ r.T)


@pytest.mark.parametrize('name', ['resnet50_sharedpp', 'mobilenetv2_100_sharedpp'])
def test_whole_shared_1x1_convolutions_start_semi_orthogonal(name):
    wide = [layer.basis for layer in shared_layers(timm.create_model(name))
            if layer.basis.num_filters > layer.in_channels * layer.kernel_size[0] ** 2]
    assert wide
    for basis in wide:
        assert_identity(rows(basis).T @ rows(basis))


def test_unique_filters_start_orthonormal():
    for layer in shared_layers(timm.create_model('resnet32_cifar_s8u1', unique_rank=3)):
        r = rows(layer.unique)
        assert_identity(r @ r.T)


def test_coefficients_start_kaiming_fan_out():
    layer = timm.create_model('resnet34_s48u1').layer3[2].conv1
    assert layer.coeff.weight.std().item() == pytest.approx((2 / layer.out_channels) ** 0.5, rel=0.05)


def test_layers_start_with_different_coefficients_and_unique_filters():
    a, b = (timm.create_model('resnet32_cifar_s8u1').layer1[i].conv1 for i in (1, 2))
    assert not torch.equal(a.coeff.weight, b.coeff.weight)
    assert not torch.equal(a.unique.weight, b.unique.weight)


@pytest.mark.parametrize('counts', [(4, 5), (20, 20)])
def test_joint_initialization_of_banks(counts):
    banks = [FilterBasis(n, 2, 3) for n in counts]  # filters of 18 weights
    init_orthonormal(*banks)
    r = rows(*banks)
    assert_identity(r @ r.T if len(r) <= 18 else r.T @ r)


# --- folding ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', FAMILIES)
def test_fold_is_exact_and_leaves_no_shared_layer(name, device):
    model = randomize_batchnorm(timm.create_model(name)).to(device).eval()
    size = min(model.default_cfg['input_size'][-1], 64)
    folded = fold(model)
    assert shared_layers(model) and not shared_layers(folded)
    assert not folded.training
    assert folded.lean_report.left == ()
    assert_fold_is_exact(folded, model, torch.randn(2, 3, size, size, device=device))


@pytest.mark.parametrize('kwargs', [
    dict(shared_rank=0, unique_rank=3), dict(shared_rank=12, unique_rank=0), dict(dual=False)])
def test_fold_of_the_ablations_is_exact(kwargs):
    model = small(**kwargs)
    assert_fold_is_exact(fold(model), model, torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize('name', ['resnet34_s48u1_dual', 'mobilenetv2_100_sharedpp', 'resnet32_cifar_s8u1'])
def test_fold_of_features_only_is_exact(name):
    model = randomize_batchnorm(timm.create_model(name, features_only=True)).eval()
    folded = fold(model)
    assert not shared_layers(folded)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for out, expected in zip(folded(x), model(x), strict=True):
            assert (out - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize('name', ['resnet32_cifar_s8u1', 'resnet50_sharedpp'])
def test_timms_reparameterize_model_folds(name):
    model = randomize_batchnorm(timm.create_model(name)).eval()
    dense = reparameterize_model(model)
    assert shared_layers(model) and not shared_layers(dense)
    assert_fold_is_exact(dense, model, torch.randn(2, 3, 32, 32))


def test_a_layer_that_is_no_linear_chain_does_not_fuse():
    layer = SharedBasisConv2d(4, 4, 3, FilterBasis(5, 4, 3), norm_layer=BatchNormAct2d)
    assert layer.fuse() is layer


@pytest.mark.parametrize('patterns, left', [
    (dict(include='layer1.*'), {'layer2', 'layer3'}), (dict(exclude=['layer1.*', 'layer3.*']), {'layer1', 'layer3'})])
def test_fold_of_some_layers(patterns, left):
    folded = fold(small(), **patterns)
    assert {name.partition('.')[0] for name, m in folded.named_modules() if isinstance(m, SharedBasisConv2d)} == left
    assert sorted(folded.lean_steps[-1]['layers']) == folded.lean_steps[-1]['layers']


def test_fold_leaves_the_original_as_it_was():
    model = small()
    before = copy.deepcopy(model.state_dict())
    folded = fold(model)
    with torch.no_grad():
        for p in folded.parameters():
            p.zero_()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(shared_layers(model)) == 12
    assert not hasattr(model, 'lean_report')
    assert not getattr(model, 'lean_steps', [])


def test_fold_report_counts():
    model = timm.create_model('resnet34_s48u1_dual').eval()
    report = fold(model).lean_report
    # 12 blocks behind the first of their stages, two convolutions each; BN weight and bias become one bias
    assert (report.folded, report.batchnorms, report.left) == (24, 24, ())
    assert report.params[0] == 11_786_968
    assert report.params[1] == 21_797_672 - 2 * (2 * 64 + 3 * 128 + 5 * 256 + 2 * 512)
    assert '11,786,968 -> 21,792,040' in str(report)
    assert 'dense size' in str(report)


def test_a_folded_network_has_the_convolutions_of_the_dense_one():
    shapes = [[tuple(p.shape) for p in m.parameters() if p.dim() == 4] for m in (
        fold(timm.create_model('resnet32_cifar_s8u1').eval()), timm.create_model('resnet32_cifar'))]
    assert shapes[0] == shapes[1]


def test_fold_needs_eval_mode():
    with pytest.raises(LeanError, match='eval'):
        fold(small().train())


@pytest.mark.parametrize('name', ['resnet20_cifar', 'resnet18'])
def test_fold_needs_a_shared_layer(name):
    with pytest.raises(LeanError, match='found no shared convolution'):
        fold(timm.create_model(name).eval())


def test_fold_twice_is_an_error():
    with pytest.raises(LeanError, match='found no shared convolution'):
        fold(fold(small()))


@pytest.mark.parametrize('name', ['resnet34_s48u1_dual', 'mobilenetv2_100_shared', 'resnet32_cifar_s8u1'])
def test_the_method_is_the_function(name):
    model = timm.create_model(name).eval()
    assert model.fold().lean_report == fold(model).lean_report


def test_a_folded_model_trains_again():
    folded = fold(small()).train()
    F.cross_entropy(folded(torch.randn(2, 3, 32, 32)), torch.arange(2)).backward()
    assert all(p.grad is not None for p in folded.parameters())


class Net(nn.Module):
    """conv -> BN, wired as the subclasses say."""

    def __init__(self):
        super().__init__()
        self.conv = SharedBasisConv2d(4, 4, 3, FilterBasis(5, 4, 3), 1)
        self.bn = nn.BatchNorm2d(4)
        randomize_batchnorm(self).eval()


class Chain(Net):
    def forward(self, x):
        return self.bn(self.conv(x))


class AlsoAdded(Net):
    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class FunctionBetween(Net):
    def forward(self, x):
        return self.bn(torch.relu(self.conv(x)))


class BatchnormTwice(Net):
    def forward(self, x):
        return self.bn(self.conv(x)) + self.bn(x)


class ConvTwice(Net):
    def forward(self, x):
        return self.bn(self.conv(self.conv(x)))


class BranchOnValues(Net):
    def forward(self, x):
        return self.bn(self.conv(x)) if x.sum() > -1e9 else x


class BatchnormFirst(Net):
    def forward(self, x):
        return self.conv(self.bn(x))


class InSequential(Net):
    def __init__(self):
        super().__init__()
        self.bn = nn.Sequential(self.bn, nn.ReLU())

    def forward(self, x):
        return self.bn(self.conv(x))


class WithAct(Net):
    def __init__(self):
        super().__init__()
        self.bn = BatchNormAct2d(4)
        randomize_batchnorm(self).eval()

    def forward(self, x):
        return self.bn(self.conv(x))


class NoStatistics(Net):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4, track_running_stats=False).eval()

    def forward(self, x):
        return self.bn(self.conv(x))


@pytest.mark.parametrize('net, absorbed', [
    (Chain, 1), (InSequential, 1), (WithAct, 1), (AlsoAdded, 0), (FunctionBetween, 0), (BatchnormTwice, 0),
    (ConvTwice, 0), (BranchOnValues, 0), (BatchnormFirst, 0), (NoStatistics, 0)])
def test_a_batchnorm_is_absorbed_only_as_the_single_follower(net, absorbed):
    model = net().eval()
    folded = fold(model)
    assert folded.lean_report.batchnorms == absorbed
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


class WithReluInside(Net):
    """A chain that is not linear: there is an activation between the filters and the coefficients."""

    def __init__(self):
        super().__init__()
        self.other = SharedBasisConv2d(4, 4, 3, FilterBasis(5, 4, 3), norm_layer=BatchNormAct2d)
        randomize_batchnorm(self).eval()

    def forward(self, x):
        return self.other(self.bn(self.conv(x)))


def test_a_chain_with_an_activation_inside_is_left_and_named():
    model = nn.Sequential(WithReluInside()).eval()
    folded = fold(model)
    assert folded.lean_report.folded == 1
    assert folded.lean_report.left == ('0.other',)
    assert 'left as they are: 0.other' in str(folded.lean_report)
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_layer_and_its_dense_form_are_the_definition_in_numpy():
    layer = layer_of(2, 3, 3, 2, 1)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64)
    filters = np.concatenate([layer.unique.weight.detach().numpy(), layer.basis.weight.detach().numpy()])
    responses = (filters * x.numpy()[0]).sum((1, 2, 3))  # the centre pixel sees the whole 3 x 3 image
    bn = layer.bn
    mean, var, scale, shift = (t.detach().numpy() for t in (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    normed = (responses - mean) / np.sqrt(var + bn.eps) * scale + shift
    expected = layer.coeff.weight.detach().numpy()[:, :, 0, 0] @ normed
    np.testing.assert_allclose(layer(x)[0, :, 1, 1].detach().numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(fold(nn.Sequential(layer).eval())(x)[0, :, 1, 1].detach().numpy(), expected, rtol=1e-10)
