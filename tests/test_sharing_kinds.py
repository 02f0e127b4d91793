"""1 x 1, linear, grouped and computed layers: the factors against numpy, the layers against their dense forms."""
import json

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import randomize_batchnorm
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d

from timm_lean import LeanError, fold, load_model, prune_channels, save_model, share
from timm_lean.layers import FilterBasis, SharedBasisConv2d, SharedBasisLinear
from timm_lean.layers.filter_banks import find_filter_banks
from timm_lean.measure import conv_depth
from timm_lean.sharing import shareable_range
from timm_lean_cli import main


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
    torch.testing.assert_close(layer.weight.flatten(1), weight, atol=1e-5, rtol=1e-4)  # which some models look at
    assert layer.weight.ndim == (2 if linear else 4) and layer.bias is layer.coeff.bias


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


@pytest.mark.parametrize('name, classifier', [
    ('mobilenetv3_small_050', True),
    *(pytest.param(name, False, marks=pytest.mark.slow)
      for name in ('tf_efficientnet_b0', 'regnety_002', 'convnext_atto'))])
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


@pytest.mark.parametrize('name, most', [
    ('resnet50', 0.3), ('mobilenetv2_100', 0.35), ('mobilenetv3_large_100', 0.35), ('efficientnet_b0', 0.35),
    ('convnext_tiny', 0.3), ('regnety_016', 0.35), ('resnext50_32x4d', 0.35), ('densenet121', 0.35), ('vgg16_bn', 0.3)])
def test_reachable(name, most):
    """The sizes alone say it, no weights are needed."""
    with torch.device('meta'):
        model = timm.create_model(name, num_classes=10)
    low, high = shareable_range(model)
    assert 0 < low <= most and high == 1
    with torch.device('meta'):
        low, _ = shareable_range(timm.create_model(name), classifier=True)
    assert 0 < low <= 0.1


def test_the_least_that_is_named_can_be_reached():
    """At the least rank another form may be the smaller one than at the ranks that a budget suggests."""
    model = timm.create_model('mobilenetv3_small_050', num_classes=4).eval()
    low, _ = shareable_range(model)
    with pytest.raises(LeanError, match=f'can have {low:.4f} to 1.0000'):
        share(model, params=low - 1e-3)
    new = share(model, params=low + 1e-3)
    assert new.lean_report.params[1] <= (low + 1e-3) * new.lean_report.params[0]


@pytest.mark.parametrize('json_output', [False, True])
def test_info_says_what_can_be_reached(json_output, capsys):
    assert main(['info', 'lcnet_035', '--shareable', *(['--json'] if json_output else [])]) == 0
    text = capsys.readouterr().out
    with torch.device('meta'):
        low, _ = shareable_range(timm.create_model('lcnet_035'), classifier=True)
    if json_output:
        assert json.loads(text)[0]['shareable']['with_classifier'] == pytest.approx(low)
    else:
        assert f'{100 * low:.1f} % with --classifier' in text


class Tied(nn.Module):
    """Two expansions and two grouped convolutions, whose outputs are read by different layers, and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.a, self.b = nn.Conv2d(8, 32, 1), nn.Conv2d(8, 32, 1)
        self.c, self.d = (nn.Conv2d(32, 32, 3, padding=1, groups=2) for _ in range(2))
        self.e, self.f = nn.Linear(32, 64), nn.Linear(32, 64)
        self.fc = nn.Linear(64, 3)

    def forward(self, x):
        x = self.stem(x)
        a, b = self.c(self.a(x)).relu().mean((2, 3)), self.d(self.b(x)).relu().mean((2, 3))
        return self.fc(self.e(a).relu() * self.f(b))


def test_channels_leave_what_is_shared():
    """Against masking: a network whose removed channels are zeroed in the dense network gives the same outputs."""
    from timm_lean.pruning.graph import build_graph, channel_group
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randn(2, 3, 5, 5)
    with torch.no_grad():  # of one column space, so that columns are the cheaper factor to share
        model.b.weight.copy_(model.a.weight.flip(1))
        model.f.weight.copy_(model.e.weight.flip(1))
    new = share(model, shared_rank=4, include=['a', 'b', 'c', 'd', 'e', 'f'])
    assert {layer.name: layer.form for layer in new.lean_report.layers} == {
        'a': 'columns', 'b': 'columns', 'c': 'rows', 'd': 'rows', 'e': 'columns', 'f': 'columns'}
    dense, cut = fold(new), new
    for name, gone, both in (('a', [3, 4, 19, 20], 'ab'), ('c', [0, 16], 'cd'), ('e', [5, 60], 'ef')):
        layer = cut.get_submodule(name)
        graph = build_graph(cut, x)
        group = channel_group(graph, layer, graph.get_pruner_of_module(layer).prune_out_channels, gone)
        makers = {d.target.module for d, _ in group if 'out_channels' in d.handler.__name__}
        if name != 'c':  # grouped convolutions share their inputs alone
            assert {cut.get_submodule(n) for n in both} <= makers
        group.prune()
        for n in both if name != 'c' else 'c':
            layer = dense.get_submodule(n)
            with torch.no_grad():
                layer.weight[gone], layer.bias[gone] = 0, 0
    assert cut.a.coeff.bank is cut.b.coeff.bank and cut.a.coeff.bank.weight.shape[0] == 28
    assert cut.c.basis is cut.d.basis and cut.c.in_channels == 28 and cut.c.out_channels == 30
    with torch.no_grad():
        torch.testing.assert_close(cut(x), dense(x), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet26', 'mobilenetv2_035', 'resnext26ts', 'convnext_atto'])
def test_channels_after_sharing(name, tmp_path):
    model = randomize_batchnorm(timm.create_model(name, num_classes=3)).eval()
    x = torch.randn(1, 3, 32, 32)
    new = prune_channels(share(model, params=0.6), x, pruning_ratio=0.3)
    assert new.lean_report.params[1] < 0.8 * new.lean_report.params[0]
    save_model(new, tmp_path / 'm.safetensors')
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / 'm.safetensors')(x), new(x))


def test_linear_layers_are_no_convolutions():
    """What counts and prunes convolutions sees the same ones before and after."""
    model = timm.create_model('convnext_atto', num_classes=3, conv_mlp=False).eval()
    new = share(model, shared_rank=8, include='*.fc?')
    assert len(new.lean_report.layers) == 2 * 12
    assert [b.name for b in find_filter_banks(new)] == [b.name for b in find_filter_banks(model)]
    assert conv_depth(new, (3, 32, 32)) == conv_depth(model, (3, 32, 32))


def test_tracing_keeps_same_padding():
    model = nn.Sequential(Conv2dSame(4, 8, 3, stride=2), Conv2dSame(8, 8, 3, stride=2)).eval()
    new, x = share(model, energy=0.7), torch.randn(1, 4, 13, 11)
    traced = torch.fx.symbolic_trace(new)
    torch.testing.assert_close(traced(x), new(x))


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


def test_rounding_does_not_stop_the_whitening():
    """Second moments of what hardly varies are indefinite: all that is left is rounding."""
    from timm_lean.calibration import whitened
    eye, vector = torch.eye(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    gram = torch.outer(vector, vector) - 1e-5 * eye
    rows, lower = whitened([gram], [eye])
    assert rows.isfinite().all() and torch.equal(lower, lower.tril())
    torch.testing.assert_close(lower @ lower.T, gram / gram.trace(), atol=1e-3, rtol=0)  # energy of the only layer
    noise = torch.randn(6, 6, dtype=torch.float64).triu(1)
    rows, lower = whitened([noise + noise.T, gram], [eye, eye])
    assert rows.isfinite().all() and lower.isfinite().all()
    with pytest.raises(LeanError, match='not finite'):
        whitened([gram * torch.nan], [eye])
