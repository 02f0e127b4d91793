"""Kernel pruning: the right kernels go, they stay gone, and the model remains an ordinary model."""
import copy
import csv
import json
import logging

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import randomize_batchnorm
from timm.utils import ModelEmaV3

from timm_lean import LeanError, load_model, save_model
from timm_lean.checkpoint.format import save_hf_dir
from timm_lean.checkpoint.recipe import recipe_of
from timm_lean.layers import FilterBasis
from timm_lean.pruning import (
    CRITERIA,
    KernelPruner,
    PruneSchedule,
    keep_zeros,
    kernel_report,
    kernel_scores,
    prune_kernels,
)
from timm_lean.pruning.analysis import THRESHOLDS, analyze_criteria
from timm_lean_cli import main


def thin(**kwargs) -> nn.Module:
    return randomize_batchnorm(timm.create_model('resnet20_cifar', **kwargs))


def dead(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: (m.weight == 0).flatten(2).all(2) for name, m in model.named_modules()
            if isinstance(m, (nn.Conv2d, FilterBasis))}


def share(model: nn.Module) -> float:
    masks = dead(model).values()
    return sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, pruner: KernelPruner | None = None,
          ) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(4, 3, 16, 16, generator=generator)
        loss = F.cross_entropy(model(x), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()


# --- which kernels ----------------------------------------------------------------------------------------------------

def numpy_value(kernel: np.ndarray, criterion: str) -> float:
    """The definitions again, by numpy."""
    k = kernel.astype(np.float64)
    eigenvalues = np.linalg.eigvals(k)
    return {
        'det': lambda: abs(np.linalg.det(k)), 'det_gram': lambda: np.linalg.det(k) ** 2,
        'min_eig': lambda: np.abs(eigenvalues).min(), 'min_eig_real': lambda: np.abs(eigenvalues.real).min(),
        'spectral_radius': lambda: np.abs(eigenvalues).max(),
        'spectral_radius_real': lambda: np.abs(eigenvalues.real).max(),
        'spectral_norm': lambda: np.linalg.norm(k, 2), 'weight': lambda: np.abs(k).mean(),
    }[criterion]()


@pytest.mark.parametrize('criterion', CRITERIA)
def test_threshold_prunes_what_the_paper_prunes(criterion, device):
    model = thin()
    conv = model.layer1[0].conv1
    with torch.no_grad():  # kernels of very different size around the threshold
        conv.weight.mul_(torch.logspace(-6, 0, 256).view(16, 16, 1, 1))
    kernels = conv.weight.detach().flatten(0, 1).numpy()
    limit = {'det': 1e-4 ** 3, 'det_gram': 1e-4 ** 6}.get(criterion, 1e-4)
    expected = [numpy_value(k, criterion) < limit for k in kernels]
    KernelPruner(model.to(device), criterion=criterion, threshold=1e-4, min_keep=0).prune()
    found = dead(model)['layer1.0.conv1'].flatten().tolist()
    assert found == expected
    assert 10 < sum(expected) < 250


@pytest.mark.parametrize('criterion', [*CRITERIA, 'trace', 'random'])
@pytest.mark.parametrize('scope', ['global', 'layer', 'filter'])
def test_amount_is_met_exactly(criterion, scope, device):
    model = thin().to(device)
    counts = {name: m.shape for name, m in dead(model).items()}
    report = KernelPruner(model, criterion=criterion, amount=0.6, scope=scope, min_keep=0).prune()
    masks = dead(model)
    if scope == 'global':
        assert report.pruned == int(0.6 * report.kernels) == sum(int(m.sum()) for m in masks.values())
    for name, (n, c) in counts.items():
        if scope == 'layer':
            assert int(masks[name].sum()) == int(0.6 * n * c + 1e-9)
        if scope == 'filter':
            assert (masks[name].sum(1) == int(0.6 * c + 1e-9)).all()


def test_global_amount_takes_the_lowest_of_all_layers():
    model = thin()
    values = {name: m.weight.detach().flatten(2).norm(dim=2) for name, m in model.named_modules()
              if isinstance(m, nn.Conv2d)}
    before = {name: kernel_scores(m.weight, 'weight') for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    model = prune_kernels(model, criterion='weight', amount=0.3, min_keep=0)
    masks = dead(model)
    highest = max(float(before[k][masks[k]].max()) for k in masks if masks[k].any())
    lowest = min(float(before[k][~masks[k]].min()) for k in masks)
    assert highest <= lowest
    assert set(values) == set(masks)


def test_determinants_of_different_kernel_sizes_are_compared_by_root():
    """5 x 5 kernels of the same scale as 3 x 3 ones have far smaller determinants; they must not all go first."""
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 5), nn.Conv2d(8, 8, 1)
    model = Two()
    for m in model.children():
        nn.init.normal_(m.weight, 0, 1e-2)
    report = prune_kernels(model, criterion='det', amount=0.5, min_keep=0).lean_report
    assert all(0.1 < layer.pruned / layer.kernels < 0.9 for layer in report.layers)


def test_contrib_is_the_share_of_the_filters_total():
    model = thin()
    conv = model.layer2[1].conv2
    with torch.no_grad():
        conv.weight[:, :5] *= 1e-5
        conv.weight[7] *= 1e-9  # a small filter with even kernels contributes evenly
        conv.weight[9] = 0
    value = kernel_scores(conv.weight, 'spectral_norm')
    expected = value / value.sum(1, keepdim=True) < 1e-3
    expected[9] = True
    model = prune_kernels(model, criterion='spectral_norm', contrib=1e-3, min_keep=0)
    assert torch.equal(dead(model)['layer2.1.conv2'], expected)
    assert expected[7, 5:].sum() == 0


def test_random_depends_on_the_seed_only():
    masks = []
    for seed in (0, 0, 1):
        model = thin()
        model = prune_kernels(model, criterion='random', amount=0.5, seed=seed, min_keep=0)
        masks.append(torch.cat([m.flatten() for m in dead(model).values()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_ignored_layers_are_not_touched():
    model = thin()
    before = copy.deepcopy(model.state_dict())
    model = prune_kernels(model, criterion='weight', amount=0.9, exclude='conv1|layer3.*')
    assert not dead(model)['conv1'].any()
    assert torch.equal(model.layer3[0].conv1.weight, before['layer3.0.conv1.weight'])
    assert dead(model)['layer1.0.conv1'].float().mean() > 0.5


def test_min_keep_keeps_the_best_and_says_so(caplog):
    model = thin()
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(1e-6)
    best = kernel_scores(model.layer1[0].conv1.weight, 'weight').flatten().topk(26).indices
    with caplog.at_level(logging.WARNING):
        report = prune_kernels(model, criterion='weight', threshold=1e-4, min_keep=0.1).lean_report
    layer = next(x for x in report.layers if x.name == 'layer1.0.conv1')
    assert layer.pruned == 256 - 26
    assert layer.kept_by_bound == 26
    assert report.bounded == ['layer1.0.conv1']
    assert 'min_keep=0.1 kept 26 kernels in 1 layers' in caplog.text
    assert 'min_keep kept 26' in str(report)
    assert not dead(model)['layer1.0.conv1'].flatten()[best].any()


def test_shared_bases_are_pruned_once():
    model = randomize_batchnorm(timm.create_model('resnet32_cifar_s16u1'))
    report = prune_kernels(model, criterion='spectral_norm', amount=0.5).lean_report
    names = [layer.name for layer in report.layers]
    assert sum('basis' in name for name in names) == 3
    assert any('unique' in name for name in names) and any('coeff' in name for name in names)
    assert report.share == pytest.approx(0.5, abs=0.01)


def test_grouped_and_depthwise_convolutions():
    model = timm.create_model('mobilenetv2_035')
    report = prune_kernels(model, criterion='spectral_norm', amount=0.4, scope='layer').lean_report
    assert report.share == pytest.approx(0.4, abs=0.01)
    assert torch.isfinite(model(torch.randn(2, 3, 32, 32))).all()


# --- they stay gone ---------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    'sgd': lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    'nesterov': lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    'adamw': lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    'rmsprop': lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('attach', [True, False])
def test_momentum_and_weight_decay_revive_nothing(name, attach):
    model = thin()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer)  # momentum is under way
    pruner = KernelPruner(model, criterion='spectral_norm', amount=0.7)
    if attach:
        pruner.attach(optimizer)
    pruner.prune()
    masks, live = dead(model), model.layer1[0].conv1.weight.detach().clone()
    train(model, optimizer, 5, None if attach else pruner)
    assert all(torch.equal(m, masks[k]) for k, m in dead(model).items())
    assert not torch.equal(live, model.layer1[0].conv1.weight), 'the others are trained'
    pruner.detach()
    train(model, optimizer, 1)
    if attach:
        assert share(model) < 0.1, 'the test would notice a revival'


def test_under_amp_with_a_grad_scaler(device):
    model = thin().to(device)
    optimizer = OPTIMIZERS['sgd'](model.parameters())
    pruner = KernelPruner(model, criterion='weight', amount=0.5)
    pruner.attach(optimizer)
    pruner.prune()
    scaler = torch.amp.GradScaler(device.type)
    for _ in range(3):
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(torch.randn(4, 3, 16, 16, device=device)).float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert share(model) == pytest.approx(0.5, abs=0.001)


def test_an_ema_follows():
    model = thin()
    ema = ModelEmaV3(model, decay=0.9)
    optimizer = OPTIMIZERS['sgd'](model.parameters())
    pruner = KernelPruner(model, criterion='weight', amount=0.6)
    pruner.follow(ema.module)
    pruner.prune()
    for _ in range(3):
        train(model, optimizer, 1)
        ema.update(model)
        pruner.step()
    assert share(ema.module) == pytest.approx(0.6, abs=0.001)
    assert ema.module.lean_steps == model.lean_steps
    with pytest.raises(LeanError, match='copy of the pruned model'):
        pruner.follow(nn.Linear(2, 2))


def test_zeros_of_a_loaded_model_stay_in_a_loop_of_ones_own(tmp_path):
    """Through torch.compile's wrapper, and in an EMA that was made before."""
    save_model(prune_kernels(thin(), criterion='weight', amount=0.5), tmp_path / 'm.safetensors')
    model = load_model(tmp_path / 'm.safetensors').train()
    ema, masks = ModelEmaV3(model, decay=0.9), dead(model)
    with torch.no_grad():
        ema.module.layer1[0].conv1.weight.add_(0.1)  # an average that remembers the time before pruning
    optimizer = OPTIMIZERS['sgd'](model.parameters())
    keeper = keep_zeros(torch.compile(model), optimizer, followers=[ema])
    for _ in range(3):
        train(model, optimizer, 1)
        ema.update(model)
        for net in (model, ema.module):
            assert all(torch.equal(m, masks[k]) for k, m in dead(net).items())
    assert keeper.report.share == kernel_report(model).share == pytest.approx(0.5, abs=0.001)
    keeper.detach()
    train(model, optimizer, 2)
    assert share(model) < 0.1, 'the test would notice a revival'
    with pytest.raises(LeanError, match='no kernel that is zero'):
        keep_zeros(thin(), optimizer)


def test_layers_left_out_of_a_second_pruning_keep_their_zeros():
    model = prune_kernels(thin(), criterion='weight', amount=0.5)
    first = dead(model)
    optimizer = OPTIMIZERS['sgd'](model.parameters())
    pruner = KernelPruner(model, criterion='weight', amount=0.7, exclude='layer1.*', again=True)
    pruner.attach(optimizer)
    pruner.prune()
    train(model, optimizer)
    assert all(torch.equal(m, first[k]) for k, m in dead(model).items() if k.startswith('layer1'))
    assert pruner.report.share == pytest.approx(0.7, abs=0.01)


def test_saving_a_pruned_model_whose_zeros_are_gone_warns(tmp_path, caplog):
    model = prune_kernels(thin(), criterion='weight', amount=0.5)
    with caplog.at_level(logging.WARNING):
        save_model(model, tmp_path / 'm.safetensors')
        assert not caplog.records
        train(model, OPTIMIZERS['sgd'](model.parameters()))
        save_model(model, tmp_path / 'm.safetensors')
    assert 'keep_zeros' in caplog.text


@pytest.mark.parametrize('wrap', [torch.compile, nn.DataParallel, ModelEmaV3])
def test_wrapped_models_are_unwrapped(wrap):
    model = wrap(thin())
    pruner = KernelPruner(model, criterion='weight', amount=0.5)
    assert not any(bank.name.startswith(('module', '_orig_mod')) for bank in pruner.banks)
    assert pruner.prune().share == pytest.approx(0.5, abs=0.001)


def test_resuming_continues_the_same_run():
    """Interrupted after 3 epochs and resumed, a run ends with the same weights as one that was not interrupted."""
    def start():
        torch.manual_seed(1)
        model = thin()
        optimizer = OPTIMIZERS['sgd'](model.parameters())
        pruner = KernelPruner(model, criterion='spectral_norm', amount=0.8, schedule='cubic', begin=1, end=5)
        pruner.attach(optimizer)
        return model, optimizer, pruner

    def run(model, optimizer, pruner, epochs):
        for epoch in epochs:
            pruner.set_progress(epoch)
            torch.manual_seed(epoch)
            train(model, optimizer, 2)

    whole = start()
    run(*whole, range(6))
    first = start()
    run(*first, range(3))
    saved = copy.deepcopy([part.state_dict() for part in first])
    second = start()
    for part, state in zip(second, saved, strict=True):
        part.load_state_dict(state)
    run(*second, range(3, 6))
    for (k, a), b in zip(whole[0].state_dict().items(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), k
    assert share(whole[0]) == pytest.approx(0.8, abs=0.001)
    assert second[0].lean_steps == whole[0].lean_steps


def test_a_pruned_model_is_an_ordinary_model(tmp_path):
    model = thin().eval()
    keys = list(model.state_dict())
    model = prune_kernels(model, criterion='spectral_norm', amount=0.5)
    assert list(model.state_dict()) == keys
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    save_model(model, tmp_path / 'm.safetensors')
    loaded = load_model(tmp_path / 'm.safetensors')
    assert torch.equal(loaded(x), expected)
    assert recipe_of(loaded) == recipe_of(model)
    save_hf_dir(model, tmp_path / 'hf')
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}/hf', pretrained=True).eval()(x), expected)


# --- schedules --------------------------------------------------------------------------------------------------------

def test_schedules_by_hand():
    assert [PruneSchedule('linear', 10, 14).due(p) for p in (0, 9.99, 10, 10.5, 11, 13, 14, 100)] == [
        0, 0, 1, 1, 2, 4, 4, 4]
    assert [PruneSchedule('linear', 0, 4).amount(k, 0.8) for k in range(1, 5)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [PruneSchedule('cubic', 0, 2).amount(k, 0.8) for k in (1, 2)] == pytest.approx([0.8 * 7 / 8, 0.8])
    assert [PruneSchedule('exponential', 0, 2).amount(k, 0.75) for k in (1, 2)] == pytest.approx([0.5, 0.75])
    assert PruneSchedule('one_shot', 3).due(2.9) == 0
    assert PruneSchedule('one_shot', 3).amount(PruneSchedule('one_shot', 3).due(3), 0.7) == 0.7
    assert PruneSchedule('cubic', 0, 1000, every=100).updates == 10
    fractions = PruneSchedule('linear', 0, 1, every=0.1)
    assert [fractions.due(i / 10) for i in range(11)] == [*range(1, 11), 10]


@pytest.mark.parametrize('schedule', ['linear', 'cubic', 'exponential'])
def test_iterative_pruning_reaches_its_amount_and_never_goes_back(schedule):
    model = thin()
    optimizer = OPTIMIZERS['sgd'](model.parameters())
    pruner = KernelPruner(model, criterion='weight', amount=0.75, schedule=schedule, begin=1, end=4)
    pruner.attach(optimizer)
    shares, masks = [], dead(model)
    for epoch in range(6):
        assert pruner.set_progress(epoch) == (1 <= epoch < 4)
        assert not pruner.set_progress(epoch + 0.5), 'between updates nothing changes'
        train(model, optimizer, 1)
        now = dead(model)
        assert all((masks[k] <= now[k]).all() for k in masks)
        masks = now
        shares.append(share(model))
    expected = [PruneSchedule(schedule, 1, 4).amount(k, 0.75) for k in (0, 1, 2, 3, 3, 3)]
    assert shares == pytest.approx(expected, abs=0.001)


# --- pruning again, and reports ---------------------------------------------------------------------------------------

def test_pruning_twice_by_accident_is_refused(tmp_path):
    model = thin()
    model = prune_kernels(model, criterion='weight', amount=0.5)
    save_model(model, tmp_path / 'm.safetensors')
    loaded = load_model(tmp_path / 'm.safetensors')
    with pytest.raises(LeanError, match=r'pruned before.*again=True'):
        prune_kernels(loaded, criterion='weight', amount=0.5)
    before = dead(loaded)
    loaded = prune_kernels(loaded, criterion='spectral_norm', amount=0.7, again=True)
    assert share(loaded) == pytest.approx(0.7, abs=0.001)
    assert all((before[k] <= m).all() for k, m in dead(loaded).items())


def test_report_counts():
    model = thin()
    with torch.no_grad():
        model.layer1[0].conv1.weight[3:5] = 0
    report = KernelPruner(model, criterion='weight', amount=0.1).report
    assert report.pruned == 2 * 16
    assert sum(layer.dead_filters for layer in report.layers) == 2
    text = str(report)
    assert 'layer1.0.conv1' in text and '2 of 16' in text and text.splitlines()[-1].startswith('all')
    bars = report.figure().axes[0].patches
    assert [bar.get_height() for bar in bars] == pytest.approx(
        [100 * layer.pruned / layer.kernels for layer in report.layers])


def test_a_technique_that_can_do_little_says_so(caplog):
    """Of a vision transformer only the patch embedding is a convolution: `[192, 3, 16, 16]`."""
    model = timm.create_model('vit_tiny_patch16_224', depth=2)
    with caplog.at_level(logging.WARNING):
        report = prune_kernels(model, amount=0.5).lean_report
    assert report.touched == 192 * 3 * 16 * 16 and report.params[0] == sum(p.numel() for p in model.parameters())
    words = f'only {100 * report.touched / report.params[0]:.1f} % of the'
    assert words in caplog.text and words in str(report)
    caplog.clear()
    assert 'only' not in str(prune_kernels(thin(), amount=0.5).lean_report) and not caplog.records


def test_the_report_is_plain_data():
    report = prune_kernels(thin(), amount=0.5).lean_report
    data = report.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data['params'] == [269_722] * 2 and data['layers'][0]['name'] == 'conv1'


def _with_nan() -> nn.Module:
    model = thin()
    with torch.no_grad():
        model.layer1[0].conv1.weight[0, 0, 0, 0] = float('nan')
    return model


@pytest.mark.parametrize('make, kwargs, words', [
    (thin, dict(criterion='eigen', amount=0.5), 'Unknown pruning criterion'),
    (thin, dict(), 'exactly one of threshold, contrib and amount, got none'),
    (thin, dict(amount=0.5, threshold=1e-4), 'exactly one.*threshold'),
    (thin, dict(amount=1), 'below 1, got 1'),
    (thin, dict(amount=-0.1), 'at least 0 and below 1, got -0.1'),
    (thin, dict(amount=float('nan')), 'got nan'),
    (thin, dict(threshold=-1), 'at least 0, got -1'),
    (thin, dict(contrib=float('nan')), 'got nan'),
    (thin, dict(criterion='random', threshold=1e-4), 'random.*no threshold'),
    (thin, dict(amount=0.5, scope='stage'), 'Unknown pruning scope'),
    (thin, dict(amount=0.5, min_keep=2), 'min_keep must be between 0 and 1'),
    (thin, dict(amount=0.5, schedule='quadratic', end=3), 'Unknown pruning schedule'),
    (thin, dict(amount=0.5, schedule='cubic'), 'needs an end'),
    (thin, dict(amount=0.5, schedule='cubic', begin=3, end=2), 'end after its begin'),
    (thin, dict(amount=0.5, schedule='cubic', begin=-1, end=2), 'begin at 0 or later'),
    (thin, dict(amount=0.5, schedule='cubic', end=2, every=0), 'positive distance'),
    (thin, dict(amount=0.5, end=2), 'one_shot.*leave out'),
    (thin, dict(threshold=1e-4, schedule='cubic', end=2), 'needs an amount'),
    (thin, dict(amount=0.5, exclude='stem.*'), "exclude='stem.*' matches no convolution"),
    (_with_nan, dict(amount=0.5), r'layer1\.0\.conv1.*not all finite'),
    (lambda: nn.Linear(2, 2), dict(amount=0.5), 'Linear has none'),
    (lambda: nn.Sequential(nn.Conv2d(2, 2, (1, 3))), dict(criterion='det', amount=0.5),
     "0: .*square kernels, got 1 x 3.*exclude='0'"),
])
def test_bad_input(make, kwargs, words):
    with pytest.raises(LeanError, match=words):
        KernelPruner(make(), **kwargs)


def test_nan_weights_during_training_are_an_error():
    model = thin()
    pruner = KernelPruner(model, amount=0.5)
    with torch.no_grad():
        model.conv1.weight.fill_(float('inf'))
    with pytest.raises(LeanError, match='not all finite'):
        pruner.set_progress(0)


# --- analysis and command line ----------------------------------------------------------------------------------------

def test_analysis_counts_what_pruning_would_prune():
    model = thin()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.mul_(torch.logspace(-6, 0, m.weight.shape[1]).view(1, -1, 1, 1))
    analysis = analyze_criteria(model, threshold=1e-4)
    for criterion in CRITERIA:
        pruned = copy.deepcopy(model)
        report = KernelPruner(pruned, criterion=criterion, threshold=1e-4, min_keep=0).prune()
        at = min(range(len(THRESHOLDS)), key=lambda i: abs(THRESHOLDS[i] - 1e-4))
        assert analysis.curves[criterion][at] == pytest.approx(report.share, abs=1e-9)
        for layer in report.layers:
            count, _, shares = analysis.layers[layer.name]
            assert (count, shares[criterion]) == (layer.kernels, pytest.approx(layer.pruned / layer.kernels))
    assert analysis.overlap['det', 'det_gram'] == 1
    assert analysis.overlap['weight', 'min_eig'] == analysis.overlap['min_eig', 'weight']
    eigenvalues = np.concatenate([np.linalg.eigvals(m.weight.detach().double().flatten(0, 1).numpy())
                                  for m in model.modules() if isinstance(m, nn.Conv2d)])
    assert analysis.complex_share == pytest.approx((np.abs(eigenvalues.imag).max(1) > 0).mean(), abs=1e-3)
    header, *rows = analysis.tables()['layers']
    assert [row[0] for row in rows] == list(analysis.layers)
    assert rows[3][header.index('weight')] == analysis.layers[rows[3][0]][2]['weight']
    assert len(analysis.figure().axes) == 4, 'three plots and a colour bar'
    assert 'spectral_norm' in str(analysis)


@pytest.mark.parametrize('call, words', [
    (lambda: analyze_criteria(thin(), threshold=-1), 'at least 0'),
    (lambda: analyze_criteria(_with_nan()), 'not all finite'),
    (lambda: analyze_criteria(nn.Sequential(nn.Conv2d(1, 1, (1, 3)))), 'square kernels'),
    (lambda: analyze_criteria(nn.Linear(1, 1)), 'has none')])
def test_bad_analyses(call, words):
    with pytest.raises(LeanError, match=words):
        call()


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('prune') / 'm.safetensors'
    save_model(thin(), path)
    return str(path)


def command(capsys, model, output, **options) -> str:
    """Run `timm-lean prune` with flags by name; its output, or its error of one line."""
    arguments = ['prune', str(model), '-o', str(output)]
    for name, value in options.items():
        arguments += [f'--{name.replace("_", "-")}', *([] if value is True else [str(value)])]
    code = main(arguments)
    out, err = capsys.readouterr()
    assert (code, err.count('\n')) == ((2, 1) if err else (0, 0))
    return err or out


def test_command_prunes_kernels(checkpoint, tmp_path, capsys):
    out = tmp_path / 'p.safetensors'
    text = command(capsys, checkpoint, out, criterion='spectral_norm', amount=0.8, plot=tmp_path / 'p.png')
    assert share(load_model(out)) == pytest.approx(0.8, abs=0.01)
    assert 'layer1.0.conv1' in text and 'non-zero' in text and 'live kernels' in text
    assert (tmp_path / 'p.png').stat().st_size > 1000
    assert '--again' in command(capsys, out, tmp_path / 'q.safetensors', amount=0.9)
    command(capsys, out, tmp_path / 'q.safetensors', amount=0.9, again=True)
    assert share(load_model(tmp_path / 'q.safetensors')) == pytest.approx(0.9, abs=0.01)


def test_command_prunes_the_layers_that_are_meant(checkpoint, tmp_path, capsys):
    out = tmp_path / 'p.safetensors'
    command(capsys, checkpoint, out, amount=0.5, include='layer1.*', exclude='layer1.0.*')
    assert {name.rpartition('.')[0] for name, mask in dead(load_model(out)).items() if mask.any()} == {
        'layer1.1', 'layer1.2'}


def test_command_compacts_and_prunes_channels(checkpoint, tmp_path, capsys):
    assert 'channels removed' in command(
        capsys, checkpoint, tmp_path / 'c.safetensors', amount=0.9, compact=True)
    out = tmp_path / 'd.safetensors'
    result = json.loads(command(
        capsys, checkpoint, out, granularity='channel', ratio=0.5, exclude='layer3.*', json=True))
    small = load_model(out)
    assert small.layer1[0].conv1.out_channels == 8 and small.layer3[0].conv1.out_channels == 64
    assert result['pruned']['params'] == sum(p.numel() for p in small.parameters()) == result['report']['params'][1]
    assert result['pruned']['bytes'] == out.stat().st_size and result['before']['params'] == 269_722
    assert '--again' in command(capsys, out, tmp_path / 'e.safetensors', granularity='channel')


@pytest.mark.parametrize('options, words', [
    (dict(amount=0.5, output='x.pt'), 'must end in .safetensors'), (dict(), 'exactly one'),
    (dict(criterion='eigen', amount=0.5), 'Unknown pruning criterion'),
    (dict(amount=0.5, min_keep=7), 'min_keep'), (dict(amount='nan'), 'amount'),
    (dict(amount=0.5, data='digits', finetune_epochs=1, batch_size=0), 'batch_size'),
    (dict(amount=0.5, data='digits', finetune_epochs=1, train_images=1), 'at least 2 training images'),
    (dict(amount=0.5, data='digits', finetune_epochs=1, opt='sgdx', weight_decay=-1), 'weight_decay'),
    (dict(granularity='channel', amount=0.5), '--amount belongs to --granularity kernel'),
    (dict(ratio=0.5), '--ratio belongs to --granularity channel')])
def test_command_refuses(checkpoint, tmp_path, capsys, options, words):
    output = tmp_path / options.pop('output', 'o.safetensors')
    assert words in command(capsys, checkpoint, output, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_fine_tuning_takes_fewer_images_than_a_batch(checkpoint, tmp_path, capsys):
    text = command(capsys, checkpoint, tmp_path / 'p.safetensors', amount=0.5, data='digits', train_images=20,
                   finetune_epochs=1, img_size=8, workers=0, device='cpu')
    assert 'fine-tuned' in text and share(load_model(tmp_path / 'p.safetensors')) == pytest.approx(0.5, abs=0.01)


def test_command_analyzes(checkpoint, tmp_path, capsys):
    arguments = ['analyze', checkpoint, '--criteria', '--threshold', '0.01', '--exclude', 'layer1.*']
    assert main([*arguments, '-o', str(tmp_path / 'a')]) == 0
    assert 'complex eigenvalues' in capsys.readouterr().out
    assert {p.name for p in (tmp_path / 'a').iterdir()} == {'curves.csv', 'layers.csv', 'overlap.csv', 'criteria.png'}
    with open(tmp_path / 'a' / 'layers.csv') as f:
        assert next(csv.DictReader(f))['layer'] == 'conv1'
    assert main([*arguments, '-o', str(tmp_path / 'b'), '--json']) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['threshold'] == 0.01 and len(result['files']) == 4
    assert all(not name.startswith('layer1') for name in result['layers'])
    assert result['overlap']['weight']['weight'] == 1
