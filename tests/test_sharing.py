"""Conversion to shared bases: exact at full rank, optimal below it, within the budget, and whole after a round trip."""
import copy

import numpy as np
import pytest
import timm
import torch
import torch.fx
import torch.nn as nn
from conftest import randomize_batchnorm
from timm.models.vgg import VGG
from torch.utils.flop_counter import FlopCounterMode

from timm_lean import LeanError, fold, load_model, save_model, share
from timm_lean.calibration import output_errors
from timm_lean.checkpoint.format import save_hf_dir
from timm_lean.layers import FilterBasis, SharedBasisConv2d
from timm_lean.pruning import KernelPruner
from timm_lean.regularizers import create_regularizer
from timm_lean_cli import main

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network(name: str = 'resnet20_cifar', **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return randomize_batchnorm(timm.create_model(name, **kwargs)).eval()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def small() -> nn.Module:
    return network(layers=(2, 2, 2), channels=(8, 16, 32))


def vgg() -> nn.Module:  # convolutions with bias
    torch.manual_seed(0)
    return VGG([8, 'M', 16, 16, 16, 'M', 24, 24, 24], num_classes=5, mlp_ratio=1 / 64).eval()


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'training'])
@pytest.mark.parametrize('dual, unique', [(False, 0), (True, 0), (False, 3)])
def test_full_rank_is_the_original(training, dual, unique):
    model = network().train(training)
    new = share(model, energy=1.0, dual=dual, unique_rank=unique)
    assert new.training == training
    assert any(isinstance(m, SharedBasisConv2d) for m in new.modules())
    with torch.no_grad():
        assert relative(new(X), copy.deepcopy(model)(X)) < 1e-4
    assert all(layer.energy > 1 - 1e-9 for layer in new.lean_report.layers)


def test_unique_filters_complete_a_small_basis():
    """16 * 9 = 144 directions: 16 unique ones span a layer's 16 filters whatever the basis is."""
    model = network()
    new = share(model, shared_rank=1, unique_rank=16, include='layer1.*')
    with torch.no_grad():
        assert relative(new(X), model(X)) < 1e-4


def test_truncation_is_the_tail_of_the_spectrum():
    model = network()
    names = [f'layer2.{b}.conv{c}' for b, c in ((0, 2), (1, 1), (1, 2), (2, 1), (2, 2))]
    rows = np.concatenate([model.get_submodule(n).weight.detach().numpy().reshape(32, -1) for n in names])
    values = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    new = share(model, shared_rank=20, stages=[2], include=names)
    lost = 0.0
    for layer in new.lean_report.layers:
        weight = model.get_submodule(layer.name).weight.detach()
        dense = new.get_submodule(layer.name).dense_weight_bias()[0]
        error = float((dense - weight).square().sum())
        assert layer.energy == pytest.approx(1 - error / float(weight.square().sum()), abs=1e-5)
        lost += error
    assert [layer.name for layer in new.lean_report.layers] == names
    assert lost == pytest.approx(float((values[20:] ** 2).sum()), rel=1e-4)
    energy = (values ** 2).cumsum() / (values ** 2).sum()
    by_energy = share(model, energy=0.7, stages=[2], include=names)
    assert by_energy.lean_report.layers[0].shared_rank == int(np.searchsorted(energy, 0.7)) + 1


def test_bases_are_orthonormal_with_unique_filters():
    new = share(network(), shared_rank=12, unique_rank=2)
    for layer in new.modules():
        if isinstance(layer, SharedBasisConv2d):
            rows = torch.cat([bank.weight.detach().flatten(1) for bank in layer.banks()])
            torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-5, rtol=0)
    assert create_regularizer('basis_ortho')(new).item() < 1e-8


@pytest.mark.parametrize('params', [0.3, 0.5, 0.8])
def test_budget_is_met(params):
    model = network()
    new = share(model, params=params)
    assert abs(count(new) / count(model) - params) <= 0.03
    assert new.lean_report.params[1] == count(new)
    assert new.lean_report.params[0] == count(model)


def test_more_parameters_keep_more():
    model = network()
    errors = [share(model, params=p, example_input=X).lean_report for p in (0.3, 0.6, 0.9)]
    kept = [min(layer.energy for layer in r.layers) for r in errors]
    assert kept == sorted(kept)
    assert errors[0].output_error > errors[2].output_error > 0
    assert f'{errors[0].params[1]:,}' in str(errors[0])


def test_output_error_is_that_of_the_layer():
    model = network()
    seen = {}
    conv = model.get_submodule('layer3.1.conv1')
    handle = conv.register_forward_hook(lambda m, a, y: seen.update(x=a[0], y=y))
    with torch.no_grad():
        model(X)
        handle.remove()
        new = share(model, shared_rank=16, example_input=X)
        wanted = relative(new.get_submodule('layer3.1.conv1')(seen['x']), seen['y'])
    got = next(la for la in new.lean_report.layers if la.name == 'layer3.1.conv1').output_error
    assert got == pytest.approx(wanted, rel=1e-4)


def test_bias_stays():
    model = vgg()
    new = share(model, energy=1.0)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert relative(new(x), model(x)) < 1e-4
        assert relative(fold(new)(x), model(x)) < 1e-4
    name = new.lean_report.layers[0].name
    assert torch.equal(new.get_submodule(name).coeff.bias, model.get_submodule(name).bias)


def test_large_batches_are_computed_by_the_composed_kernel():
    """The same function and gradients; which form runs is read off the operations."""
    torch.manual_seed(0)
    basis = FilterBasis(24, 8, 3, dtype=torch.float64)
    layer = SharedBasisConv2d(8, 16, 3, basis, 2, stride=2, norm_layer=None, bias=True, dtype=torch.float64)
    torch.nn.init.normal_(layer.coeff.bias)
    x = torch.randn(6, 8, 24, 24, dtype=torch.float64)
    results = []
    for hooked in (False, True):
        if hooked:
            layer.coeff.register_forward_hook(lambda *_: None)  # needs the coefficients to run by themselves
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
        y.square().sum().backward()
        results.append((counter.get_total_flops() // 2, y, *(p.grad for p in layer.parameters())))
        layer.zero_grad()
    places = 6 * 12 * 12
    assert results[0][0] == places * 16 * 72 + 16 * 26 * 72
    assert results[1][0] == places * 26 * (72 + 16)
    for a, b in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(a, b)
    layer.coeff._forward_hooks.clear()
    with FlopCounterMode(display=False) as counter:
        layer(x[:1, :, :4, :4])  # too small to be worth it
    assert counter.get_total_flops() // 2 == 4 * 26 * (72 + 16)


@pytest.mark.slow
def test_converted_networks_trace_compile_and_export():
    model = share(network(layers=(2, 2, 2)), shared_rank=40).eval()
    x = X[:2]
    with torch.no_grad():
        expected = model(x)
        assert relative(torch.fx.symbolic_trace(model.get_submodule('layer1.1.conv1'))(torch.ones(8, 16, 32, 32)),
                        model.get_submodule('layer1.1.conv1')(torch.ones(8, 16, 32, 32))) < 1e-5
        assert relative(torch.compile(model, backend='aot_eager')(x), expected) < 1e-5
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))
        assert relative(program.module()(X), model(X)) < 1e-5


def test_calibrated_batch_norm_changes_nothing_at_first(tmp_path):
    model = small()
    plain = share(model, energy=0.8, unique_rank=1, calibration=[X])
    new = share(model, energy=0.8, unique_rank=1, bn=True, calibration=[(X, None)])
    assert count(new) > count(plain)
    with torch.no_grad():
        assert relative(new(X), plain(X)) < 1e-5
        other = torch.randn(2, 3, 32, 32)
        assert relative(new(other), plain(other)) < 1e-5
        assert relative(fold(new)(X), plain(X)) < 1e-4
        assert relative(copy.deepcopy(new).train()(X), copy.deepcopy(plain).train()(X)) < 1e-3
    bn = new.get_submodule('layer1.0.conv1').bn  # the statistics are those of the responses
    seen = []
    bn.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    trained = copy.deepcopy(new).eval()
    trained.bn1.train()
    trained(X)
    x = seen[-1].transpose(0, 1).flatten(1)
    torch.testing.assert_close(bn.running_mean, x.mean(1), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(bn.running_var, x.var(1, correction=0), atol=1e-4, rtol=1e-3)
    new = share(model, energy=0.8, bn=True, calibration=[X])
    save_model(new, tmp_path / 'm.safetensors')
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / 'm.safetensors').eval()(X), new(X))


def test_ranks_are_those_that_leave_the_output_nearest(monkeypatch):
    def model():
        given = small()
        for block in given.layer3:  # images excite a few inputs of the second convolutions, whatever their weights are
            block.bn1.weight.data[3:] = block.bn1.bias.data[3:] = 0
        return given

    def ranks(errors):
        monkeypatch.setattr('timm_lean.sharing.convert.output_errors',
                            lambda networks, *args: judged.extend(networks) or errors)
        new = share(model(), params=0.4, dual=True, calibration=[X])
        return [layer.shared_rank for layer in new.lean_report.layers]

    judged = []
    plain = share(model(), params=0.4, dual=True)
    assert ranks([0., 1.]) == [layer.shared_rank for layer in plain.lean_report.layers] != ranks([1., 0.])
    assert torch.equal(judged[0](X), plain(X)), 'as the weights alone make it'


def test_output_errors_are_those_of_every_fourth_image():
    model, new = small(), share(small(), params=0.5)
    error, none = output_errors([new, model], model, [X[:3], X[3:], X])
    held = torch.cat([X, X])[3::4]
    assert error == pytest.approx(relative(new(held), model(held)), rel=1e-4) and none == 0


def test_budget_counts_the_batch_norms():
    model = small()
    new = share(model, params=0.5, bn=True, calibration=[X])
    assert abs(count(new) / count(model) - 0.5) <= 0.03 and new.lean_report.params[1] == count(new)


def test_original_is_untouched_and_copies_share():
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    new = copy.deepcopy(share(model, shared_rank=8))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    layers = [m for m in new.modules() if isinstance(m, SharedBasisConv2d)]
    assert len({id(m.basis) for m in layers}) < len(layers)


def test_features_and_checkpointing():
    thin = dict(channels=(8, 16, 24, 32))
    features = timm.create_model('resnet18', features_only=True, **thin).eval()
    x = torch.randn(1, 3, 64, 64)
    new = share(features, energy=1.0)
    with torch.no_grad():
        for a, b in zip(new(x), features(x), strict=True):
            assert relative(a, b) < 1e-4
    model = timm.create_model('resnet18', num_classes=3, **thin)
    new = share(model, shared_rank=8)
    new.set_grad_checkpointing()
    new.train()(x.expand(2, -1, -1, -1)).sum().backward()
    assert all(p.grad is not None for p in new.parameters())


def test_share_prune_train_save_load_fold(tmp_path):
    model = share(network(layers=(2, 2, 2), num_classes=4), params=0.5, unique_rank=1)
    KernelPruner(model, criterion='weight', amount=0.3).prune()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(X).square().mean().backward()
    optimizer.step()
    model.eval()
    for form in (model, fold(model)):
        save_model(form, tmp_path / 'm.safetensors')
        again = load_model(tmp_path / 'm.safetensors').eval()
        with torch.no_grad():
            assert torch.equal(again(X), form(X))
        assert count(again) == count(form)
    with torch.no_grad():
        assert relative(fold(model)(X), model(X)) < 1e-4


def test_local_dir(tmp_path):
    model = share(network(), shared_rank=10)
    save_hf_dir(model, tmp_path / 'd')
    again = timm.create_model(f'local-dir:{tmp_path / "d"}', pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(again(X), model(X))


def test_sharing_twice_takes_what_is_left(tmp_path):
    model = share(share(network(), shared_rank=10, stages=[1]), shared_rank=20, stages=[2])
    save_model(model, tmp_path / 'm.safetensors')
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / 'm.safetensors').eval()(X), model(X))


@pytest.mark.parametrize('arguments, message', [
    ({}, 'exactly one'),
    ({'shared_rank': 4, 'params': 0.5}, 'shared_rank, params'),
    ({'shared_rank': 0}, 'shared_rank must be a whole number of at least 1, got 0'),
    ({'shared_rank': 2.5}, 'got 2.5'),
    ({'shared_rank': 2, 'unique_rank': -1}, 'unique_rank'),
    ({'energy': 1.5}, 'energy must be a share'),
    ({'params': 0.0}, 'params must be a share'),
    ({'params': 0.001}, 'out of reach: this network can have 0.'),
    ({'shared_rank': 2, 'include': 'nothing*'}, "'nothing\\*' matches no layer"),
    ({'shared_rank': 2, 'stages': [9]}, 'there is nothing to share'),
    ({'shared_rank': 2, 'bn': True}, 'bn=True needs calibration=LOADER'),
    ({'shared_rank': 2, 'calibration': []}, 'needs images'),
])
def test_bad_arguments(arguments, message):
    with pytest.raises(LeanError, match=message):
        share(network(), **arguments)


def test_nothing_to_share():
    with pytest.raises(LeanError, match='nothing to share'):
        share(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)), shared_rank=2)


@pytest.fixture(scope='module')
def small_file(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('share') / 'dense.safetensors'
    save_model(timm.create_model(
        'resnet20_cifar', num_classes=10, in_chans=1, layers=(2, 2, 2), channels=(8, 16, 32)), path)
    return str(path)


def test_command(small_file, tmp_path, capsys):
    out = tmp_path / 'shared.safetensors'
    assert main(['share', small_file, '--params', '0.6', '--bn', '-o', str(out), '--data', 'digits', '--img-size', '8',
                 '--train-images', '64', '--workers', '0', '--finetune-epochs', '1', '--distill', '--device', 'cpu',
                 '--calibrate', '64']) == 0
    text = capsys.readouterr().out
    assert 'energy kept' in text and 'relative error of the output' in text and str(out) in text
    titles, = (line.split() for line in text.splitlines() if line.split()[:1] == ['before'])
    top1, = (line.split()[1::2] for line in text.splitlines() if line.startswith('top-1'))
    numbers = dict(zip(titles, map(float, top1), strict=True))
    assert set(numbers) == {'before', 'converted', 'fine-tuned'} and all(0 <= n <= 100 for n in numbers.values())
    model = load_model(out)
    assert any(isinstance(m, SharedBasisConv2d) and isinstance(m.bn, nn.BatchNorm2d) for m in model.modules())
    assert abs(count(model) / count(load_model(small_file)) - 0.6) < 0.03
    assert [p.name for p in tmp_path.iterdir()] == ['shared.safetensors'], 'no temporary files stay'


@pytest.mark.parametrize('options, message', [
    (['--params', '0.001'], 'out of reach'),
    (['--shared-rank', '4', '--bn'], '--bn needs training images'),
    (['--shared-rank', '4', '--bn', '--data', 'digits', '--calibrate', '0'], '--bn needs training images'),
    (['--shared-rank', '4', '--finetune-epochs', '2'], '--finetune-epochs needs data'),
    (['--shared-rank', '4', '--distill'], '--distill is for fine-tuning'),
    (['--shared-rank', '4', '--finetune-lr', '0.1'], '--finetune-lr is for fine-tuning'),
    (['--shared-rank', '4', '--data', 'digits', '--finetune-epochs', '1', '--finetune-lr', 'nan'], 'lr must be'),
    (['--shared-rank', '4', '--include', 'nope*'], 'matches no layer'),
])
def test_command_errors(small_file, tmp_path, capsys, options, message):
    out = tmp_path / 'shared.safetensors'
    assert main(['share', small_file, '-o', str(out), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
