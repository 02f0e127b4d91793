"""1 x 1, linear, grouped and computed layers: the factors against numpy, the layers against their dense forms."""
import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import randomize_batchnorm
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d

from timm_lean import LeanError, fold, load_model, save_model, share
from timm_lean.layers import FilterBasis, SharedBasisConv2d, SharedBasisLinear
from timm_lean.sharing import shareable_range


def matrices(*layers: nn.Module) -> list[np.ndarray]:
    return [layer.weight.detach().double().flatten(1).numpy() for layer in layers]


def truncated(stack: np.ndarray, rank: int) -> np.ndarray:
    u, s, v = np.linalg.svd(stack, full_matrices=False)
    return u[:, :rank] * s[:rank] @ v[:rank]


def dense(model: nn.Module, name: str) -> np.ndarray:
    return model.get_submodule(name).dense_weight_bias()[0].flatten(1).numpy()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize('inputs, outputs, form', [(12, 40, 'columns'), (40, 12, 'rows')])
@pytest.mark.parametrize('linear', [False, True])
def test_the_cheaper_factor_is_shared_and_is_the_best_one(inputs, outputs, form, linear):
    layers = [nn.Linear(inputs, outputs) if linear else nn.Conv2d(inputs, outputs, 1) for _ in range(3)]
    model = nn.Sequential(*layers).eval()
    new = share(model, shared_rank=6)
    assert {layer.form for layer in new.lean_report.layers} == {form}
    axis = 1 if form == 'columns' else 0
    expected = np.split(truncated(np.concatenate(matrices(*layers), axis), 6), 3, axis)
    for name, weight in zip('012', expected, strict=True):
        np.testing.assert_allclose(dense(new, name), weight, atol=1e-5)
    counted = 6 * outputs + 3 * 6 * inputs if form == 'columns' else 6 * inputs + 3 * 6 * outputs
    assert sum(p.numel() for p in new.parameters()) == counted + 3 * outputs
    x = torch.randn(2, 5, 7, inputs) if linear else torch.randn(2, inputs, 7, 5)
    for got, original in zip(new, fold(new), strict=True):
        assert type(original) is (nn.Linear if linear else nn.Conv2d)
        torch.testing.assert_close(got(x), original(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('linear', [False, True])
@pytest.mark.parametrize('batch', [1, 400])
def test_both_ways_to_run_a_layer_are_its_definition(linear, batch):
    """Whether coefficients and filters are multiplied first depends on the batch."""
    options = {'coefficients': FilterBasis(9, 14, 1), 'bias': True}
    layer = SharedBasisLinear(8, 9, None, 14, **options) if linear else SharedBasisConv2d(
        8, 9, 1, None, 14, norm_layer=None, **options)
    nn.init.normal_(layer.coeff.bias)
    x = torch.randn(batch, 8)
    weight = layer.coeff.bank.weight.flatten(1) @ layer.unique.weight.flatten(1)
    y = layer(x) if linear else layer(x[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(y, x @ weight.T + layer.coeff.bias, atol=1e-4, rtol=1e-4)


def test_grouped_convolutions_share_a_basis_in_each_group():
    layers = [nn.Conv2d(24, 36, 3, padding=1, groups=3) for _ in range(3)]
    model = nn.Sequential(*layers[:1], nn.Conv2d(36, 24, 1), layers[1], nn.Conv2d(36, 24, 1), layers[2]).eval()
    new = share(model, shared_rank=5, unique_rank=1, include=['0', '2', '4'])
    weights = np.stack(matrices(*layers)).reshape(3, 3, 12, 72)  # [layers, groups, filters, d]
    for group in range(3):
        stack = weights[:, group].reshape(36, 72)
        shared = truncated(stack, 5).reshape(3, 12, 72)
        for index, name in enumerate('024'):
            expected = shared[index] + truncated(weights[index, group] - shared[index], 1)
            got = dense(new, name).reshape(3, 12, 72)[group]
            np.testing.assert_allclose(got, expected, atol=1e-5)
    x = torch.randn(2, 24, 6, 6)
    folded = fold(new)
    assert folded[0].groups == 3
    with torch.no_grad():
        torch.testing.assert_close(new(x), folded(x), atol=1e-5, rtol=1e-4)
        # enough positions that filters and coefficients are multiplied first
        x = torch.randn(8, 24, 32, 32)
        torch.testing.assert_close(new[0](x), folded[0](x), atol=1e-5, rtol=1e-4)


def test_a_layer_alone_is_an_ordinary_product():
    model = nn.Sequential(nn.Linear(60, 50)).eval()
    weight, = matrices(model[0])
    new = share(model, energy=0.5)
    rank = new.lean_report.layers[0].shared_rank
    energies = np.cumsum(np.linalg.svd(weight, compute_uv=False) ** 2)
    assert rank == int(np.searchsorted(energies, 0.5 * energies[-1])) + 1
    np.testing.assert_allclose(dense(new, '0'), truncated(weight, rank), atol=1e-5)
    with pytest.raises(LeanError, match='nothing to share'):
        share(model, energy=0.5, alone=False)
    with pytest.raises(LeanError, match='ask for less'):
        share(model, energy=0.999)


@pytest.mark.parametrize('kind', [Conv2dSame, StdConv2d, ScaledStdConv2d, ScaledStdConv2dSame])
def test_computed_weights_and_padding(kind):
    """What is shared is what the layer computes with; an input of odd size shows the padding."""
    model = nn.Sequential(*(kind(6, 8, kernel_size=3, stride=2, bias=True) for _ in range(2))).eval()
    for layer in model:
        nn.init.normal_(layer.weight, 1)
        if hasattr(layer, 'gain'):
            nn.init.normal_(layer.gain)
    x = torch.randn(2, 6, 9, 10)
    with torch.no_grad():
        new = share(model, shared_rank=16)
        folded = fold(new)
        for before, after, plain in zip(model, new, folded, strict=True):
            torch.testing.assert_close(after(x), before(x), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(plain(x), before(x), atol=1e-5, rtol=1e-4)
    assert type(folded[0]) is (Conv2dSame if 'Same' in kind.__name__ else nn.Conv2d)


@pytest.mark.parametrize('name, classifier', [('mobilenetv3_small_050', True), ('tf_efficientnet_b0', False),
                                              ('regnety_002', False), ('convnext_atto', False)])
def test_networks_meet_the_budget_and_come_back(name, classifier, tmp_path):
    model = randomize_batchnorm(timm.create_model(name, num_classes=10)).eval()
    low, high = shareable_range(model, classifier=classifier)
    assert low < 0.35 and high == 1
    x = torch.randn(2, 3, 64, 64)
    new = share(model, params=0.4, classifier=classifier)
    assert abs(new.lean_report.params[1] / new.lean_report.params[0] - 0.4) <= 0.03
    assert 'depthwise' in new.lean_report.left.values() or name == 'regnety_002'
    new.train()
    new(x).square().mean().backward()
    torch.optim.SGD(new.parameters(), lr=1e-4).step()
    save_model(new.eval(), tmp_path / 'm.safetensors')
    with torch.no_grad():
        y = new(x)
        assert torch.equal(load_model(tmp_path / 'm.safetensors').eval()(x), y)
        assert float((fold(new)(x) - y).norm() / y.norm()) < 1e-4


def test_what_stays_is_said():
    new = share(timm.create_model('mobilenetv3_small_050').eval(), params=0.8)
    left = new.lean_report.left
    assert left['blocks.0.0.conv_dw'] == 'depthwise' and left['classifier'] == 'classifier'
    assert '(depthwise)' in str(new.lean_report)


def pair(inputs: int, outputs: int, linear: bool) -> tuple[nn.Module, torch.Tensor]:
    """Two layers of one shape, each behind a mixing of its own."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            make = (lambda a, b: nn.Linear(a, b)) if linear else (lambda a, b: nn.Conv2d(a, b, 1))
            self.a, self.b = make(inputs, outputs), make(inputs, outputs)
            self.mix = torch.randn(2, inputs, inputs) * torch.logspace(0, -2, inputs)

        def forward(self, x):
            if linear:
                return self.a(x @ self.mix[0]) + self.b(x @ self.mix[1]).tanh()
            y = [torch.einsum('bihw,ij->bjhw', x, mix) for mix in self.mix]
            return self.a(y[0]) + self.b(y[1]).tanh()
    return Net().eval(), torch.randn(600, inputs) if linear else torch.randn(60, inputs, 4, 4)


@pytest.mark.parametrize('inputs, outputs, form', [(12, 40, 'columns'), (40, 12, 'rows')])
@pytest.mark.parametrize('linear', [False, True])
def test_images_choose_the_factors(inputs, outputs, form, linear):
    model, x = pair(inputs, outputs, linear)
    plain, fitted = share(model, shared_rank=5), share(model, shared_rank=5, calibration=[x])
    assert plain.lean_report.layers[0].form == form
    with torch.no_grad():
        errors = [float((new(x) - model(x)).norm()) for new in (plain, fitted)]
    assert errors[1] < 0.7 * errors[0]


def test_own_filters_are_fitted_by_least_squares():
    """One layer with given shared coefficients, against numpy's solution for its filters and bias."""
    from timm_lean.calibration import calibrate
    original = nn.Sequential(nn.Linear(6, 20)).eval()
    columns = FilterBasis(20, 4, 1)
    layer = SharedBasisLinear(6, 20, None, 4, coefficients=columns, bias=True)
    nn.init.normal_(columns.weight)
    x = torch.randn(400, 6) * torch.logspace(0, -1, 6) + 1
    new = calibrate(nn.Sequential(layer).eval(), original, [x], ridge=1e-9)
    mix = columns.weight.detach().double().flatten(1).numpy()
    weight, = matrices(original[0])
    expected = mix @ np.linalg.pinv(mix) @ weight
    np.testing.assert_allclose(dense(new, '0'), expected, atol=2e-3)
    assert torch.equal(new[0].coeff.bank.weight, columns.weight), 'what others use too stays'
    assert F.mse_loss(new(x), original(x)) < F.mse_loss(nn.Sequential(layer)(x), original(x))
