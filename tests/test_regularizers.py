"""The basis_ortho loss against the paper's definition in numpy, and the registry that makes regularizers by name."""
import copy
import gc
import math
import weakref

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_lean.errors import LeanError
from timm_lean.layers import FilterBasis, SharedBasisConv2d
from timm_lean.regularizers import (
    BasisOrtho,
    Regularizer,
    create_regularizer,
    list_regularizers,
    loss_terms,
    parse_regularizer,
    register_regularizer,
)
from timm_lean.regularizers.orthogonality import _gram_error


def model_of(name: str = 'resnet20_cifar', noise: float = 0.1, **kwargs) -> nn.Module:
    """A model whose filters are away from their orthonormal start."""
    model = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, FilterBasis):
                m.weight.add_(noise * torch.randn_like(m.weight))
    return model


# --- the definition, independent of the package: float64, entry by entry ----------------------------------------------

def flat(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().reshape(len(tensor), -1)


def stages_of(model: nn.Module) -> list[list[dict[str, torch.Tensor]]]:
    """The shared layers of each stage as `{'conv': name, 'basis': tensor, 'unique': tensor}`, by module names."""
    stages: dict[str, list[dict]] = {}
    for name, m in model.named_modules():
        if isinstance(m, SharedBasisConv2d):
            *path, _block, conv = name.split('.')
            entry = {'conv': conv}
            entry.update({k: getattr(m, k).weight for k in ('basis', 'unique') if getattr(m, k) is not None})
            stages.setdefault('.'.join(path), []).append(entry)
    return list(stages.values())


def definition(model: nn.Module, include_unique: bool = False, by_conv: bool = False) -> float:
    """Design 3.1: squared entries of `B B^T - I`, over the stages, divided by the number of the entries.

    Args:
        model: A model with stages of blocks.
        include_unique: Shared rows against all filters of the stage, and unique rows within their convolution.
        by_conv: Shared++: one term for each kind of convolution, added.
    """
    kinds = sorted({layer['conv'] for stage in stages_of(model) for layer in stage}) if by_conv else [None]
    total = 0.0
    for kind in kinds:
        squares, entries = 0.0, 0
        for stage in stages_of(model):
            layers = [layer for layer in stage if kind is None or layer['conv'] == kind]
            distinct = {id(layer['basis']): layer['basis'] for layer in layers if 'basis' in layer}
            rows, owners = [], []
            for basis in distinct.values():
                rows += list(flat(basis))
                owners += ['shared'] * len(basis)
            for i, layer in enumerate(layers):
                if include_unique and 'unique' in layer:
                    rows += list(flat(layer['unique']))
                    owners += [i] * len(layer['unique'])
            for a in range(len(rows)):
                for b in range(len(rows)):
                    both_shared = owners[a] == owners[b] == 'shared'
                    shared_unique = owners[a] == 'shared' and owners[b] != 'shared'
                    same_conv = owners[a] != 'shared' and owners[a] == owners[b]
                    if both_shared or shared_unique or same_conv:
                        squares += (rows[a] @ rows[b] - (a == b)) ** 2
                        entries += 1
        total += squares / entries
    return total


@pytest.mark.parametrize('include_unique', [False, True])
@pytest.mark.parametrize('kwargs', [
    dict(shared_rank=4, unique_rank=1), dict(shared_rank=4, unique_rank=1, dual=True),
    dict(shared_rank=6, unique_rank=0), dict(shared_rank=3, unique_rank=3, dual=True)])
def test_basis_ortho_is_the_definition(kwargs, include_unique, device):
    model = model_of(**kwargs)
    reg = create_regularizer('basis_ortho', weight=10.0, include_unique=include_unique)
    expected = definition(model, include_unique)
    model.to(device)
    assert expected > 1e-3
    assert reg.raw(model).item() == pytest.approx(expected, rel=1e-4)
    assert reg(model).item() == pytest.approx(10 * expected, rel=1e-4)


def test_unique_filters_alone_are_the_definition():
    model = model_of(shared_rank=0, unique_rank=3)
    assert BasisOrtho(include_unique=True).raw(model).item() == pytest.approx(definition(model, True), rel=1e-4)


def sharedpp(noise: float = 0.1) -> nn.Module:
    """ResNet-50 Shared++ with one sharing block in each of two narrow stages: small enough for the definition."""
    return nn.Sequential(*(nn.Sequential(nn.ModuleDict({
        'conv2': SharedBasisConv2d(
            w, w, 3, FilterBasis(w, w, 3, stage=g, kind='conv2'), coefficients=False, norm_layer=None),
        'conv3': SharedBasisConv2d(
            w, 4 * w, 1, FilterBasis(4 * w, w, 1, stage=g, kind='conv3'), coefficients=False, norm_layer=None),
    })) for g, w in enumerate((3, 5))))


def test_sharedpp_has_one_term_for_each_kind():
    model = sharedpp()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    assert BasisOrtho().raw(model).item() == pytest.approx(definition(model, by_conv=True), rel=1e-4)


@pytest.mark.parametrize('name', ['resnet50_sharedpp', 'mobilenetv2_100_sharedpp'])
def test_the_real_sharedpp_models_have_two_terms(name):
    model = model_of(name, noise=0.01)
    total = 0.0
    for kind in {m.kind for m in model.modules() if isinstance(m, FilterBasis)}:
        squares, entries = 0.0, 0
        for layer in {id(m): m for m in model.modules() if isinstance(m, FilterBasis) and m.kind == kind}.values():
            rows = flat(layer.weight)
            squares += ((rows @ rows.T - np.eye(len(rows))) ** 2).sum()
            entries += len(rows) ** 2
        total += squares / entries
    assert BasisOrtho().raw(model).item() == pytest.approx(total, rel=1e-4)


def test_normalization_is_over_all_stages_at_once():
    model = model_of(shared_rank=2, unique_rank=0)
    with torch.no_grad():
        for stage, scale in ((model.layer1, 2.0), (model.layer2, 1.0), (model.layer3, 1.0)):
            basis = stage[1].conv1.basis.weight
            basis.copy_(scale * torch.eye(len(basis), basis[0].numel()).view_as(basis))
    # stage 1 has 2 filters of squared length 4: two entries of 3^2; stages have 2, 4 and 8 filters
    assert BasisOrtho().raw(model).item() == pytest.approx(18 / (4 + 16 + 64))


# --- values that are known --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', ['resnet34_s32u1', 'resnet50_shared', 'resnet32_cifar_s8u1',
                                  'resnet34_s32u1_dual', 'resnet32_cifar_s16u1_dual', 'resnet34_cifar_s8u1'])
def test_orthonormal_bases_start_at_0(name):
    assert BasisOrtho().raw(timm.create_model(name)).item() == pytest.approx(0, abs=1e-9)


def test_separately_initialized_dual_bases_do_not_start_at_0():
    model = timm.create_model('resnet34_s32u1_dual')
    for basis in {m for m in model.modules() if isinstance(m, FilterBasis)}:
        basis.reset_parameters()
    assert BasisOrtho().raw(model).item() > 1e-5


@pytest.mark.parametrize('name', ['resnet50_sharedpp', 'mobilenetv2_100_shared'])
def test_semi_orthogonal_convolutions_start_at_their_minimum(name):
    model = timm.create_model(name)
    reg = BasisOrtho()
    minimum = 0.0
    banks = {id(m): m for m in model.modules() if isinstance(m, FilterBasis)}.values()
    for kind in {m.kind for m in banks}:
        sizes = [(m.num_filters, m.weight[0].numel()) for m in banks if m.kind == kind]
        minimum += sum(max(n - d, 0) for n, d in sizes) / sum(n * n for n, _ in sizes)
    assert minimum > 0
    assert reg.raw(model).item() == pytest.approx(minimum, rel=1e-4)
    with torch.no_grad():
        for bank in banks:
            bank.weight.add_(0.01 * torch.randn_like(bank.weight))
    assert reg.raw(model).item() > minimum * 1.001


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 12), d=st.integers(1, 12), scale=st.sampled_from((0.1, 1.0, 3.0)))
def test_gram_error_of_any_shape(n, d, scale):
    rows = scale * torch.randn(n, d, dtype=torch.float64)
    expected = np.square(rows.numpy() @ rows.numpy().T - np.eye(n)).sum()
    torch.testing.assert_close(_gram_error(rows).item(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('shape', [(3, 5), (4, 4), (6, 2)])
def test_gram_error_gradcheck(shape):
    assert torch.autograd.gradcheck(_gram_error, torch.randn(shape, dtype=torch.float64, requires_grad=True))


def test_gradient_is_the_analytic_one():
    model = model_of(shared_rank=4, unique_rank=1)
    BasisOrtho(weight=3.0)(model).backward()
    for stage in (model.layer1, model.layer2, model.layer3):
        weight = stage[1].conv1.basis.weight
        rows = flat(weight)
        expected = 3.0 * 4 * (rows @ rows.T - np.eye(len(rows))) @ rows / (4 ** 2 + 8 ** 2 + 16 ** 2)
        np.testing.assert_allclose(weight.grad.numpy().reshape(rows.shape), expected, rtol=1e-4, atol=1e-6)
        assert stage[1].conv1.unique.weight.grad is None
        assert stage[1].conv1.coeff.weight.grad is None


def test_unique_filters_get_gradients_when_included():
    model = model_of(shared_rank=4, unique_rank=1)
    BasisOrtho(include_unique=True)(model).backward()
    assert all(m.weight.grad.abs().max() > 0 for m in model.modules() if isinstance(m, FilterBasis))


@pytest.mark.parametrize('include_unique', [False, True])
def test_descent_makes_the_bases_orthonormal(include_unique):
    model = model_of(shared_rank=4, unique_rank=2, dual=True, noise=0.05)
    reg = BasisOrtho(weight=1.0, include_unique=include_unique)
    before = reg.raw(model).item()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    for _ in range(300):
        optimizer.zero_grad()
        reg(model).backward()
        optimizer.step()
    assert reg.raw(model).item() < before / 20


# --- where it is used -------------------------------------------------------------------------------------------------

def test_fp32_and_the_same_value_under_bf16_autocast():
    model, reg = model_of(shared_rank=4, unique_rank=1), BasisOrtho()
    expected = reg(model)
    with torch.autocast('cpu', torch.bfloat16):
        value = reg(model)
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype is torch.bfloat16, 'autocast was on'
    assert value.dtype is torch.float32
    assert value.shape == ()
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_fp32_for_models_of_other_dtypes(dtype):
    model, reg = model_of(shared_rank=4, unique_rank=1), BasisOrtho()
    expected = reg(model).item()
    value = reg(copy.deepcopy(model).to(dtype))
    assert value.dtype is torch.float32
    assert value.item() == pytest.approx(expected, rel=0.05)


class Wrapper(nn.Module):
    """What DistributedDataParallel looks like from outside."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize('wrap', [nn.Sequential, Wrapper, lambda m: torch.compile(m, backend='eager')],
                         ids=['sequential', 'wrapper', 'compiled'])
def test_same_value_for_a_wrapped_model(wrap):
    model = model_of(shared_rank=4, unique_rank=1, dual=True)
    torch.testing.assert_close(BasisOrtho()(wrap(model)), BasisOrtho()(model), rtol=0, atol=0)


def test_features_only_models_work():
    model = timm.create_model('resnet20_cifar', features_only=True, shared_rank=4, unique_rank=1)
    assert BasisOrtho().raw(model).item() == pytest.approx(0, abs=1e-9)


def test_layers_are_found_once_per_model():
    class Counting(BasisOrtho):
        name = ''
        calls = 0

        def find(self, model):
            self.calls += 1
            return super().find(model)

    reg = Counting()
    a, b = model_of(shared_rank=4), model_of(shared_rank=4)
    for model in (a, b, a, b):
        reg(model)
    assert reg.calls == 2


def test_values_follow_the_weights_after_training_and_loading():
    model, other, reg = model_of(shared_rank=4), model_of(shared_rank=4, noise=0.5), BasisOrtho()
    before = reg(model).item()
    model.load_state_dict(other.state_dict(), assign=True)
    after = reg(model)
    assert after.item() != pytest.approx(before, rel=0.1)
    assert after.item() == pytest.approx(reg(other).item())


def test_a_copy_of_a_model_is_another_model():
    model, reg = model_of(shared_rank=4), BasisOrtho()
    before = reg(model).item()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(2)
    assert reg(twin).item() > before
    assert reg(model).item() == before


def test_a_regularizer_does_not_keep_a_model_alive():
    model, reg = model_of(shared_rank=4), BasisOrtho()
    reg(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


# --- names, weights, specs --------------------------------------------------------------------------------------------

def test_basis_ortho_is_registered():
    assert 'basis_ortho' in list_regularizers()
    reg = create_regularizer('basis_ortho')
    assert isinstance(reg, BasisOrtho)
    assert reg.weight == 10.0
    assert reg.include_unique is False


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(LeanError, match=r"'basis_orto'.*basis_ortho"):
        create_regularizer('basis_orto')


@pytest.mark.parametrize('weight', [-1.0, -1e-9, math.nan, math.inf, -math.inf, '10', None, True, [1.0]])
def test_a_bad_weight_is_an_error_that_names_it(weight):
    with pytest.raises(LeanError) as e:
        create_regularizer('basis_ortho', weight=weight)
    assert repr(weight) in str(e.value)
    assert 'basis_ortho' in str(e.value)


def test_weight_0_is_allowed():
    assert create_regularizer('basis_ortho', weight=0)(model_of(shared_rank=4)).item() == 0


def test_an_unknown_argument_is_an_error():
    with pytest.raises(LeanError, match=r'basis_ortho.*lamda'):
        create_regularizer('basis_ortho', lamda=10)


@pytest.mark.parametrize('name', ['resnet20_cifar', 'resnet18'])
def test_a_model_without_bases_is_an_error(name):
    with pytest.raises(LeanError, match=r'basis_ortho.*no shared filter basis'):
        BasisOrtho()(timm.create_model(name))


def test_unique_filters_alone_need_include_unique():
    with pytest.raises(LeanError, match='include_unique'):
        BasisOrtho()(model_of(shared_rank=0, unique_rank=2))


@pytest.mark.parametrize('spec, weight, include_unique', [
    ('basis_ortho', 10.0, False), ('basis_ortho=2.5', 2.5, False), ('basis_ortho=1e-3', 1e-3, False),
    ('basis_ortho=0', 0.0, False), ('basis_ortho=10,include_unique=true', 10.0, True),
    ('basis_ortho,include_unique=True', 10.0, True), ('basis_ortho=3,include_unique=false', 3.0, False)])
def test_parse(spec, weight, include_unique):
    reg = parse_regularizer(spec)
    assert (type(reg), reg.weight, reg.include_unique) == (BasisOrtho, weight, include_unique)


@pytest.mark.parametrize('spec, words', [
    ('basis_orto=10', 'basis_orto'), ('basis_ortho=ten', "'ten' is not a number"), ('basis_ortho=', 'not a number'),
    ('basis_ortho=-1', '-1'), ('basis_ortho=nan', 'nan'), ('basis_ortho=inf', 'inf'),
    ('basis_ortho=1,include_unique', 'KEY=VALUE'), ('basis_ortho=1,colour=red', 'colour'), ('', 'Unknown'),
    ('=3', 'Unknown'), ('basis_ortho=1,=2', 'basis_ortho')])
def test_a_bad_spec_is_an_error(spec, words):
    with pytest.raises(LeanError, match=words):
        parse_regularizer(spec)


def test_loss_terms_are_weighted_and_raw():
    model = model_of(shared_rank=4)
    reg = BasisOrtho(weight=7.0)
    terms = loss_terms([reg], model)
    assert list(terms) == ['loss_basis_ortho', 'basis_ortho']
    torch.testing.assert_close(terms['loss_basis_ortho'], reg(model))
    torch.testing.assert_close(terms['basis_ortho'], reg.raw(model))
    assert terms['loss_basis_ortho'].requires_grad
    assert not terms['basis_ortho'].requires_grad


def test_no_regularizers_no_terms():
    assert loss_terms([], model_of(shared_rank=4)) == {}


def test_a_new_regularizer_joins_the_registry_and_a_taken_name_does_not():
    class Zero(Regularizer):
        name = 'zero_for_test'

        def find(self, model):
            return list(model.parameters())

        def compute(self, layers):
            return 0 * layers[0].sum()

    from timm_lean.regularizers import base
    try:
        assert register_regularizer(Zero) is Zero
        assert create_regularizer('zero_for_test', weight=2)(nn.Linear(2, 2)).item() == 0
        with pytest.raises(LeanError, match='zero_for_test'):
            register_regularizer(Zero)
    finally:
        base._REGISTRY.pop('zero_for_test', None)


def test_repr_names_the_weight():
    assert repr(BasisOrtho(weight=2.5)) == 'BasisOrtho(weight=2.5)'
