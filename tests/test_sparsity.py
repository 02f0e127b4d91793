"""Filter banks, the other regularizers on them (l1, group_lasso, kernel_ortho, srip), and the schedules of all."""
import math
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn

from timm_lean import LeanError
from timm_lean.layers import FilterBasis, SharedBasisConv2d
from timm_lean.layers.filter_banks import find_filter_banks
from timm_lean.regularizers import (
    L1,
    BasisOrtho,
    GroupLasso,
    KernelOrtho,
    Schedule,
    Srip,
    create_regularizer,
    list_regularizers,
    list_schedules,
    loss_terms,
    parse_regularizer,
    set_progress,
)


def conv(weight: list, groups: int = 1) -> nn.Sequential:
    tensor = torch.tensor(weight, dtype=torch.float32)
    tensor = tensor.reshape(*tensor.shape, *[1] * (4 - tensor.ndim))
    layer = nn.Conv2d(tensor.shape[1] * groups, len(tensor), tensor.shape[2:], groups=groups)
    layer.weight = nn.Parameter(tensor)
    return nn.Sequential(layer)


def test_l1_by_hand():
    model = conv([[1.0, -2.0], [0.0, 0.5]])
    value = L1(2.0)(model)
    value.backward()
    assert value.item() == 7.0
    assert model[0].weight.grad.flatten().tolist() == [2.0, -2.0, 0.0, 2.0]


def test_group_lasso_by_hand_and_at_zero():
    model = conv([[3.0, 4.0], [0.0, 0.0]])
    value = GroupLasso()(model)
    value.backward()
    assert value.item() == pytest.approx(math.sqrt(2) * 5, rel=1e-6)
    expected = math.sqrt(2) * torch.tensor([0.6, 0.8, 0.0, 0.0])
    torch.testing.assert_close(model[0].weight.grad.flatten(), expected)


@pytest.mark.parametrize('shape,groups', [((5, 3, 3, 3), 1), ((8, 2, 1, 1), 1), ((6, 2, 3, 3), 2), ((4, 1, 3, 3), 4)])
def test_orthogonality_equals_the_definition(shape, groups):
    layer = nn.Conv2d(shape[1] * groups, shape[0], shape[2:], groups=groups)
    model = nn.Sequential(layer)
    soft, spectral = 0.0, 0.0
    for rows in layer.weight.detach().double().flatten(1).chunk(groups):
        error = rows @ rows.T - torch.eye(len(rows))
        soft += error.square().sum().item()
        small = error if len(rows) <= rows.shape[1] else rows.T @ rows - torch.eye(rows.shape[1])
        spectral += torch.linalg.matrix_norm(small, 2).item()
    assert KernelOrtho()(model).item() == pytest.approx(soft, rel=1e-5)
    assert Srip(iterations=500)(model).item() == pytest.approx(spectral, rel=1e-4)
    assert Srip(iterations=1)(model).item() <= spectral * (1 + 1e-5)


def test_srip_gradient_is_that_of_the_spectral_norm():
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    with torch.no_grad():
        model[0].weight.mul_(3)
    grad, = torch.autograd.grad(Srip(iterations=1000)(model), [model[0].weight])
    rows = model[0].weight.detach().double().flatten(1).requires_grad_()
    torch.linalg.matrix_norm(rows @ rows.T - torch.eye(5), 2).backward()
    torch.testing.assert_close(grad.flatten(1).double(), rows.grad, rtol=1e-2, atol=1e-3 * rows.grad.abs().max().item())


def test_srip_is_zero_for_orthonormal_filters():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False))
    nn.init.orthogonal_(model[0].weight)
    assert Srip()(model).item() < 1e-5 and KernelOrtho()(model).item() < 1e-9


def test_banks_are_listed_once():
    basis = FilterBasis(6, 4, 3)
    model = nn.Sequential(*(SharedBasisConv2d(4, 4, 3, basis, unique_rank=2) for _ in range(2)), nn.Conv2d(4, 4, 1))
    model.append(nn.Conv2d(4, 4, 1))
    model[3].weight = model[2].weight  # tied by parameter
    banks = find_filter_banks(model)
    assert [bank.name for bank in banks] == ['0.unique', '0.basis', '0.coeff', '1.unique', '1.coeff', '2']
    assert banks[1].weight is basis.weight and banks[1].filters_per_group == 6


def test_patterns_and_switches():
    model = nn.Sequential(OrderedDict(
        stem=nn.Conv2d(3, 8, 7), a=nn.Conv2d(8, 8, 3), b=nn.Conv2d(8, 8, 3), point=nn.Conv2d(8, 8, 1),
        wide=nn.Conv2d(8, 8, (1, 3))))

    def names(**kwargs):
        return [bank.name for bank in find_filter_banks(model, **kwargs)]
    assert names() == ['stem', 'a', 'b', 'point', 'wide']
    assert names(skip_stem=True, skip_1x1=True) == ['a', 'b', 'wide']
    assert names(include='[ab]|wide', exclude=['b']) == ['a', 'wide']
    with pytest.raises(LeanError, match=r"include='layer9\.\*' matches no convolution.*stem"):
        names(include=['a', 'layer9.*'])
    with pytest.raises(LeanError, match=r"exclude='x' matches no"):
        names(exclude='x')
    with pytest.raises(LeanError, match='leave none'):
        names(include='stem', skip_stem=True)


@pytest.mark.parametrize('name', [n for n in list_regularizers() if n != 'basis_ortho'])
def test_every_filter_regularizer(name):
    """Descends, counts a shared basis once, is reproducible, takes patterns, refuses bad input."""
    basis = FilterBasis(6, 4, 3)
    with torch.no_grad():
        basis.weight.normal_(0, 0.5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), *(SharedBasisConv2d(4, 4, 3, basis) for _ in range(2)))
    reg = create_regularizer(name, weight=2.0)
    before = reg(model)
    assert before.ndim == 0 and before.dtype == torch.float32 and torch.equal(before, reg(model))
    before.backward()
    assert basis.weight.grad.abs().sum() > 0
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None and p.grad.norm() > 0:
                p -= 1e-3 * p.norm() * p.grad / p.grad.norm()
    assert reg(model) < before
    alone = nn.Sequential(nn.Conv2d(4, 6, 3))
    alone[0].weight = basis.weight
    assert create_regularizer(name, include='*basis')(model).item() == pytest.approx(
        create_regularizer(name)(alone).item(), rel=1e-6)
    with pytest.raises(LeanError, match='matches no convolution'):
        create_regularizer(name, include='nowhere')(model)
    with pytest.raises(LeanError, match='has none'):
        create_regularizer(name)(nn.Linear(2, 2))
    with pytest.raises(LeanError, match='at least 0'):
        create_regularizer(name, weight=-1.0)
    with torch.no_grad():
        model[0].weight[0] = float('inf')
    with pytest.raises(LeanError, match='not all finite'):
        create_regularizer(name)(model)


@pytest.mark.parametrize('iterations', [0, 2.5, True])
def test_srip_bad_iterations(iterations):
    with pytest.raises(LeanError, match='whole number'):
        create_regularizer('srip', iterations=iterations)


def test_schedule_shapes():
    assert list_schedules() == ['constant', 'cosine', 'linear', 'warmup_cosine', 'warmup_linear']
    for shape in list_schedules():
        schedule = Schedule.parse(f'{shape}@0.5')
        start, end = {'constant': (1, 1)}.get(shape, (0, 1) if 'warmup' in shape else (1, 0))
        assert schedule.factor(0) == pytest.approx(start)
        assert schedule.factor(0.5) == schedule.factor(1) == pytest.approx(end)
    assert Schedule.parse('linear').factor(0.25) == 0.75
    assert Schedule.parse('cosine').factor(0.5) == pytest.approx(0.5)
    assert Schedule.parse('cosine').factor(0.25) == pytest.approx((1 + math.sqrt(0.5)) / 2)
    assert Schedule.parse('warmup_linear').factor(0.05) == pytest.approx(0.5)  # a warm-up takes a tenth of training
    assert Schedule.parse('warmup_cosine@1').factor(0.25) == pytest.approx((1 - math.sqrt(0.5)) / 2)


@pytest.mark.parametrize('text', ['step', '', 'cosine@0', 'cosine@1.5', 'cosine@x', 'cosine@nan'])
def test_schedule_bad_text(text):
    with pytest.raises(LeanError, match=r'[Ss]chedule'):
        parse_regularizer(f'l1=1:{text}')


def test_schedule_reaches_the_loss():
    model = conv([[1.0, -2.0]])
    reg = parse_regularizer('l1=10:linear,skip_stem=false')
    ortho = create_regularizer('basis_ortho', weight=3, schedule='warmup_linear@1')
    assert isinstance(ortho, BasisOrtho) and ortho.scheduled_weight == 0
    assert reg(model).item() == 30
    set_progress([reg, ortho], 0.75)
    assert reg(model).item() == 7.5 and ortho.scheduled_weight == 2.25
    terms = loss_terms([reg], model)
    assert terms['loss_l1'].item() == 7.5 and terms['l1'].item() == 3 and not terms['l1'].requires_grad
    reg.set_progress(2)
    assert reg(model).item() == 0 and reg.weight == 10
    assert repr(reg) == 'L1(weight=10, schedule=linear@1)' and repr(L1()) == 'L1(weight=1)'
    with pytest.raises(LeanError, match='progress'):
        reg.set_progress(float('nan'))


def test_resume_needs_the_step_only():
    """A fresh regularizer told the progress of a step weighs as the one that lived through training."""
    lived = parse_regularizer('conv_similarity=1e-3:cosine')
    for step in range(40):
        lived.set_progress(step / 100)
    fresh = parse_regularizer('conv_similarity=1e-3:cosine')
    fresh.set_progress(39 / 100)
    assert fresh.scheduled_weight == lived.scheduled_weight != fresh.weight


def test_parse_forms():
    assert parse_regularizer('l1').schedule == Schedule()
    assert parse_regularizer('l1:cosine').schedule.shape == 'cosine'
    assert parse_regularizer('l1=2,schedule=cosine@0.5').schedule == Schedule('cosine', 0.5)
    reg = parse_regularizer('conv_similarity=1e-4:warmup_cosine,pairs=adjacent,include=a|b*,skip_1x1=true')
    assert (reg.weight, reg.pairs, reg.include, reg.skip_1x1) == (1e-4, 'adjacent', 'a|b*', True)
    with pytest.raises(LeanError, match='not a number'):
        parse_regularizer('l1=much:cosine')


def test_terms_of_one_name_do_not_replace_each_other():
    model = nn.Sequential(*conv([[1.0]]), *conv([[2.0]]))
    terms = loss_terms([L1(1.0, include='0'), L1(10.0, include='1')], model)
    assert {k: v.item() for k, v in terms.items()} == {'loss_l1': 1, 'l1': 1, 'loss_l1_2': 20, 'l1_2': 2}
