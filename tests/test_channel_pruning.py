"""Channel pruning: scores by hand, models that run, rebuild, and tell the truth about their channels."""
import copy
import json
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch_pruning as tp
from conftest import randomize_batchnorm

from timm_lean import Calibration, CheckpointError, LeanError, load_model, save_model
from timm_lean.calibration import output_scores
from timm_lean.checkpoint.format import read_header, save_hf_dir
from timm_lean.checkpoint.recipe import build, recipe_of
from timm_lean.layers import SharedBasisConv2d
from timm_lean.pruning import SpectralImportance, kernel_scores, prune_channels
from timm_lean.pruning.graph import build_graph, channel_groups, is_consistent


def model_of(name: str, **kwargs) -> nn.Module:
    return randomize_batchnorm(timm.create_model(name, **kwargs)).eval()


def image(name: str = '') -> torch.Tensor:
    return torch.randn(1, 3, *((32, 32) if 'cifar' in name else (64, 64)))


# --- importance -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('criterion', ['spectral_norm', 'det', 'min_eig', 'weight'])
def test_a_score_by_hand(criterion):
    model = model_of('resnet18')
    graph = tp.DependencyGraph().build_dependency(model, image())
    conv = model.layer1[0].conv1
    group = graph.get_pruning_group(conv, tp.prune_conv_out_channels, list(range(64)))
    first = SpectralImportance(criterion, group_reduction='first', normalizer=None)(group)
    torch.testing.assert_close(first, kernel_scores(conv.weight, criterion).sum(1).float())
    total = SpectralImportance(criterion, group_reduction='sum', normalizer=None)(group)
    reader = kernel_scores(model.layer1[0].conv2.weight, criterion).sum(0).float()
    torch.testing.assert_close(total, first + reader)


def test_weight_importance_equals_torch_prunings_own():
    """mean |w| of 3 x 3 kernels is a ninth of the L1 norm that Torch-Pruning sums."""
    model = model_of('resnet18')
    graph = tp.DependencyGraph().build_dependency(model, image())
    group = graph.get_pruning_group(model.layer2[1].conv1, tp.prune_conv_out_channels, list(range(128)))
    for reduction in ('sum', 'mean', 'max', 'prod', 'first', 'gate'):
        for normalizer in (None, 'sum', 'mean', 'max', 'gaussian', 'standarization', 'lamp'):
            ours = SpectralImportance('weight', reduction, normalizer)(group)
            scale = {None: 9 ** (2 if reduction == 'prod' else 1)}.get(normalizer, 1)
            theirs = tp.importance.GroupMagnitudeImportance(
                1, reduction, normalizer, target_types=[nn.modules.conv._ConvNd])(group)
            torch.testing.assert_close(ours * scale, theirs, rtol=1e-3, atol=1e-4)


def test_the_importance_works_in_torch_prunings_pruners():
    model = model_of('resnet18')
    pruner = tp.pruner.BasePruner(
        model, image(), importance=SpectralImportance('spectral_radius'), pruning_ratio=0.5, ignored_layers=[model.fc],
        in_channel_groups={}, out_channel_groups={}, num_heads={})
    pruner.step()
    assert model.layer1[0].conv1.weight.shape == (32, 32, 3, 3)
    assert torch.isfinite(model(image())).all()


def test_grouped_input_channels_are_scored_by_their_own_group():
    conv = nn.Conv2d(8, 12, 3, groups=4)
    values = SpectralImportance('weight')._channel_values(conv, tp.prune_conv_in_channels)
    expected = torch.stack([kernel_scores(conv.weight, 'weight')[3 * (c // 2):3 * (c // 2) + 3, c % 2].sum()
                            for c in range(8)])
    torch.testing.assert_close(values, expected)


def test_channels_chosen_by_what_they_do():
    """By brute force: hold one channel at its mean, and look at what the layer behind makes of it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double().eval()
    with torch.no_grad():
        model[0].weight[5] *= 4  # large, but nothing reads it
        model[2].weight[:, 5] /= 100
    images = torch.randn(16, 3, 10, 10, dtype=torch.float64)
    inner = model[:2](images)
    growth = torch.stack([
        F.conv2d(inner[:, [c]] - inner[:, c].mean(), model[2].weight[:, [c]]).var((0, 2, 3)).sum() for c in range(8)])
    model, images = model.float(), images.float()
    best = sorted(growth.argsort()[2:].tolist())
    new = prune_channels(model, images[:1], criterion='output', pruning_ratio=0.25, round_to=1,
                         calibration=Calibration([images], positions=64, ridge=0.))
    assert new.lean_report.kept['0'] == best and 5 not in best
    with pytest.raises(LeanError, match='needs calibration=LOADER'):
        prune_channels(model, images[:1], criterion='output')


def test_scores_found_before_choose_the_same_channels():
    model, images = model_of('resnet20_cifar'), torch.randn(8, 3, 32, 32)
    options = dict(criterion='output', pruning_ratio=0.3, round_to=1, global_pruning=True)
    scores = output_scores(model, None, [images])
    new = prune_channels(model, images[:1], scores=scores, **options)
    assert new.lean_report.kept == prune_channels(model, images[:1], calibration=[images], **options).lean_report.kept
    assert len({len(kept) for name, kept in new.lean_report.kept.items() if name.startswith('layer3')}) > 1
    for wrong in (dict(criterion='weight'), dict(iterative_steps=2)):
        with pytest.raises(LeanError, match="scores are for criterion='output'"):
            prune_channels(model, images[:1], scores=scores, **{**options, **wrong})


class Twice(nn.Module):
    """A layer reads each channel as it is and pooled."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.a(x)
        return self.b(torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1))


def test_a_channel_that_is_read_twice_counts_twice():
    model = Twice().eval()
    with torch.no_grad():
        model.b.weight[:, :8] *= 0.01
        model.b.weight[:, [10, 13]] *= 0.01  # 2 and 5 by both ways
    images = torch.randn(8, 3, 8, 8)
    new = prune_channels(model, images[:1], criterion='output', pruning_ratio=0.25, round_to=1, calibration=[images])
    assert new.lean_report.kept['a'] == [0, 1, 3, 4, 6, 7]


@pytest.mark.parametrize('kwargs, words', [
    (dict(criterion='eigen'), 'Unknown pruning criterion'), (dict(group_reduction='median'), 'group_reduction'),
    (dict(normalizer='l2'), 'normalizer')])
def test_bad_importances(kwargs, words):
    with pytest.raises(LeanError, match=words):
        SpectralImportance(**kwargs)


# --- families ---------------------------------------------------------------------------------------------------------

FAST = ['resnet18', 'resnet20_cifar']
SLOW = [
    'mobilenetv3_small_050',
    'regnety_002', 'convnext_atto',
    'resnet50', 'resnet18d', 'wide_resnet50_2', 'resnext50_32x4d', 'seresnet50', 'resnetv2_50', 'resnest14d',
    'densenet121', 'vgg11_bn', 'mobilenetv2_050', 'mobilenetv3_large_100', 'efficientnet_lite0', 'efficientnet_b0',
    'tf_efficientnetv2_b0', 'regnetx_002', 'convnextv2_atto', 'repvgg_a0', 'ghostnet_050', 'dla34', 'hrnet_w18_small',
    'cspresnet50', 'cspdarknet53', 'darknet53', 'xception41', 'mnasnet_small', 'fbnetc_100', 'hardcorenas_a',
    'tinynet_e', 'semnasnet_075', 'selecsls42b', 'lcnet_050', 'dpn48b', 'resnet32_cifar_s16u1_dual',
    'resnet50_sharedpp', 'resnet34_s48u1_dual', 'mobilenetv2_100_shared']


@pytest.mark.parametrize('name', [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_family(name, tmp_path):
    """Smaller, runs, rebuilds bit for bit, tells its channels, trains, and can be pruned again."""
    model, x = model_of(name), image(name)
    small = prune_channels(model, x, pruning_ratio=0.5)
    report = small.lean_report
    assert report.macs[1] < 0.9 * report.macs[0] or 'cifar' in name
    assert report.params[1] < report.params[0]
    out = small(x)
    assert out.shape == (1, model.num_classes)
    save_model(small, tmp_path / 'm.safetensors')
    loaded = load_model(tmp_path / 'm.safetensors')
    assert torch.equal(loaded(x), out)
    levels = [entry['num_chs'] for entry in getattr(loaded.feature_info, 'info', loaded.feature_info)]
    save_hf_dir(loaded, tmp_path / 'hf')
    try:
        features = timm.create_model(f'local-dir:{tmp_path}/hf', pretrained=True, features_only=True).eval()
    except AttributeError:
        features = None  # timm's feature getter needs forward_intermediates, which this family lacks
    if features is not None:
        assert [f.shape[1] for f in features(x)] == features.feature_info.channels() == levels
    assert loaded.num_features == loaded.forward_features(x).shape[1]
    loaded.reset_classifier(3)
    assert loaded(x).shape == (1, 3)
    small.train()
    small(torch.cat([x, x])).square().mean().backward()
    again = prune_channels(small, x, pruning_ratio=0.3, round_to=4)
    assert again.lean_report.params[1] < report.params[1]
    assert len([s for s in again.lean_steps if s['op'] == 'resize']) == 1
    save_model(again, tmp_path / 'again.safetensors')
    assert torch.equal(load_model(tmp_path / 'again.safetensors')(x), again.eval()(x))


# --- what is removed --------------------------------------------------------------------------------------------------

def test_the_channels_that_stay_are_the_best_and_keep_their_weights():
    model, x = model_of('resnet18'), image()
    small = prune_channels(model, x, pruning_ratio=0.5, group_reduction='first', normalizer=None)
    conv, bn = model.layer3[1].conv1, model.layer3[1].bn1
    best = kernel_scores(conv.weight, 'spectral_norm').sum(1).topk(128).indices.sort().values
    stream = kernel_scores(model.layer3[0].conv2.weight, 'spectral_norm').sum(1)
    kept = small.layer3[1].conv1.weight
    assert kept.shape == (128, 128, 3, 3)
    assert torch.equal(small.layer3[1].bn1.weight, bn.weight[best])
    assert stream.shape == (256,)
    sub = conv.weight[best]
    columns = [int((sub - kept[:, c:c + 1]).flatten(2).abs().sum((0, 2)).argmin()) for c in range(128)]
    assert torch.equal(kept, sub[:, columns])


def test_channels_without_effect_leave_without_effect():
    """What nobody reads has the lowest importance by readers, so pruning exactly that much keeps the outputs."""
    model, x = model_of('resnet18'), image()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d) and m.in_channels > 3:
                m.weight[:, ::2] = 0
                m.weight[::2] = 0  # and the makers are weak too
        model.fc.weight[:, ::2] = 0
    small = prune_channels(model, x, pruning_ratio=0.5)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)


def test_global_pruning_meets_its_ratio_and_empties_nothing():
    model, x = model_of('resnet18'), image()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d):
                mean = kernel_scores(m.weight, 'weight').sum(1).mean()
                m.weight.mul_(torch.rand(m.out_channels, 1, 1, 1) * 10 / mean)
        model.layer2[0].conv1.weight.mul_(1e-6)
    small = prune_channels(model, x, criterion='weight', pruning_ratio=0.4, global_pruning=True, round_to=1,
                           max_pruning_ratio=0.8, normalizer=None,
                           group_reduction='first')
    assert small.layer2[0].conv1.out_channels == round(0.2 * 128)
    assert len({m.out_channels / n.out_channels for m, n in zip(small.modules(), model.modules(), strict=True)
                if isinstance(m, nn.Conv2d)}) > 3, 'layers lose different shares'


def test_channel_counts_are_multiples_and_no_layer_is_emptied():
    small = prune_channels(model_of('mobilenetv2_050'), image(), pruning_ratio=0.85, round_to=8)
    widths = [m.out_channels for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert all(w % 8 == 0 and w >= 8 for w in widths)


def test_iterative_pruning_ends_at_the_same_widths_and_calls_back():
    model, x, calls = model_of('resnet20_cifar'), image('cifar'), []
    one = prune_channels(model, x, pruning_ratio=0.5)
    many = prune_channels(
        model, x, pruning_ratio=0.5, iterative_steps=3, between_steps=lambda m, step: calls.append(step))
    assert calls == [1, 2]
    assert [p.shape for p in one.parameters()] == [p.shape for p in many.parameters()]


@pytest.mark.parametrize('name', ['resnet18', 'mobilenetv2_035', 'regnetx_002'])
def test_kept_channels_are_those_of_the_original(name):
    """What the report says is kept, cut out of the original by hand, is what is there."""
    model, x = model_of(name), image()
    small = prune_channels(model, x, iterative_steps=2)
    report, old = small.lean_report, dict(model.named_modules())
    assert {n for n, *_ in report.layers} <= report.kept.keys()
    for layer, m in small.named_modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            w = old[layer].weight
            outs = report.kept.get(layer, range(len(w)))
            expected = w[list(outs)]
            if getattr(m, 'groups', 1) == 1:
                expected = expected[:, list(report.kept_inputs.get(layer, range(w.shape[1])))]
            elif m.weight.shape[1] > 1:
                continue  # grouped: every group loses other inputs
            assert torch.equal(m.weight, expected), layer
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def test_include_limits_what_is_cut():
    model, x = model_of('resnet18'), image()
    small = prune_channels(model, x, include='layer2|layer3.1', exclude='layer2.0')
    assert {name for name, *_ in small.lean_report.layers} == {'layer2.1.conv1', 'layer3.1.conv1'}


def test_excluded_layers_and_the_head_stay():
    model, x = model_of('resnet18', num_classes=13), image()
    small = prune_channels(model, x, pruning_ratio=0.5, exclude='layer4.*.conv1|layer1')
    assert small.layer4[0].conv1.out_channels == 512
    assert small.layer1[0].conv1.out_channels == 64
    assert small.layer3[0].conv1.out_channels == 128
    assert small.fc.out_features == 13


def test_the_given_model_is_unchanged():
    model, x = model_of('resnet18').train(), image()
    model.conv1.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    small = prune_channels(model, x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training and small.training
    assert not small.conv1.weight.requires_grad and small.fc.weight.requires_grad
    assert model.num_features == 512 and model.feature_info[-1]['num_chs'] == 512
    assert not hasattr(model, 'lean_steps')


@pytest.mark.parametrize('name', ['resnet34_s32u1', pytest.param('resnet50_sharedpp', marks=pytest.mark.slow)])
def test_shared_bases_stay_shared(name, tmp_path):
    model, x = model_of(name), image()
    small = prune_channels(model, x, pruning_ratio=0.5)
    count = [len({id(m.basis) for m in net.modules() if isinstance(m, SharedBasisConv2d)}) for net in (model, small)]
    assert count[0] == count[1] > 0
    for m in small.modules():
        if isinstance(m, SharedBasisConv2d):
            assert all(bank.weight.shape[1] == bank.in_channels == m.in_channels for bank in m.banks())
    save_model(small, tmp_path / 'm.safetensors')
    loaded = load_model(tmp_path / 'm.safetensors')
    assert torch.equal(loaded(x), small(x))
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in small.parameters())


def test_a_pruned_model_learns():
    model, x = prune_channels(model_of('resnet20_cifar'), image('cifar')).train(), torch.randn(8, 3, 32, 32)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(x), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- recipes ----------------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_a_fresh_process_rebuilds(tmp_path):
    model, x = prune_channels(model_of('resnet18'), image()), image()
    save_model(model, tmp_path / 'm.safetensors')
    torch.save((x, model(x)), tmp_path / 'io.pt')
    code = ("import torch, timm_lean; torch.set_num_threads(1);"
            f"x, y = torch.load('{tmp_path}/io.pt');"
            f"assert torch.equal(timm_lean.load_model('{tmp_path}/m.safetensors')(x), y); print('equal')")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == 'equal', done.stderr


def test_another_head_on_a_loaded_model_is_saved_again(tmp_path):
    model = prune_channels(model_of('resnet20_cifar'), image('cifar'))
    save_model(model, tmp_path / 'a.safetensors')
    other = load_model(tmp_path / 'a.safetensors', num_classes=3)
    save_model(other, tmp_path / 'b.safetensors')
    x = image('cifar')
    assert torch.equal(load_model(tmp_path / 'b.safetensors')(x), other(x))


def test_the_recipe_is_small_plain_data(tmp_path):
    model = prune_channels(model_of('resnet18'), image())
    recipe = recipe_of(model)
    assert json.loads(json.dumps(recipe.steps)) == recipe.steps
    assert recipe.steps[0]['modules']['layer1.0.conv1'] == {
        'weight': [32, 32, None, None], 'in_channels': 32, 'out_channels': 32}
    assert [p.shape for p in build(recipe).parameters()] == [p.shape for p in model.parameters()]


@pytest.fixture(scope='module')
def pruned_file(tmp_path_factory):
    path = tmp_path_factory.mktemp('pruned') / 'm.safetensors'
    save_model(prune_channels(model_of('resnet18'), image()), path)
    load_model(path)
    return path


@pytest.mark.parametrize('change', [
    lambda s: s.update(modules=[]), lambda s: s.update(modules={'nowhere': {'out_channels': 3}}),
    lambda s: s.update(modules={'conv1': 3}), lambda s: s['modules']['conv1'].update(weight=[0, None, None, None]),
    lambda s: s['modules']['conv1'].update(weight=[10 ** 12, None, None, None]),
    lambda s: s['modules']['conv1'].update(weight=[8, 3]), lambda s: s['modules']['conv1'].update(weight=['8'] * 4),
    lambda s: s['modules']['conv1'].update(out_channels='8'), lambda s: s['modules']['conv1'].update(forward=3),
    lambda s: s['modules']['conv1'].update(_modules=3), lambda s: s['modules']['conv1'].update(training=0),
    lambda s: s['modules']['conv1'].update(bias=[10 ** 12]), lambda s: s.update(feature_channels=[1]),
    lambda s: s.update(feature_channels='x'), lambda s: s.update(extra=1), lambda s: s['modules'].pop('conv1')])
def test_damaged_steps_are_refused(change, pruned_file, tmp_path):
    from safetensors.torch import load_file, save_file
    header = read_header(pruned_file)
    change(header['steps'][0])
    path = tmp_path / 'm.safetensors'
    save_file(load_file(pruned_file), path, metadata={'timm_lean': json.dumps(header)})
    with pytest.raises(CheckpointError):
        load_model(path)


@pytest.mark.parametrize('kwargs, words', [
    (dict(pruning_ratio=1), 'below 1 .1 would empty'), (dict(pruning_ratio=0), 'above 0'),
    (dict(pruning_ratio=float('nan')), 'got nan'),
    (dict(pruning_ratio=0.95), 'max_pruning_ratio'), (dict(max_pruning_ratio=1), 'max_pruning_ratio'),
    (dict(round_to=0), 'round_to'),
    (dict(iterative_steps=0), 'iterative_steps'), (dict(criterion='eigen'), 'Unknown pruning criterion'),
    (dict(exclude='stem*'), 'matches no module'), (dict(exclude='*'), 'no channels to prune')])
def test_bad_input(kwargs, words):
    with pytest.raises(LeanError, match=words):
        prune_channels(model_of('resnet20_cifar'), image('cifar'), **kwargs)


def test_groups_are_torch_prunings_own():
    """Every channel followed once, every path followed with all of them: the same groups in the same order."""
    model = model_of('mobilenetv3_small_050')
    graph = build_graph(model, image())
    ours, lost = channel_groups(graph, [model.classifier])
    theirs = graph.get_all_groups(ignored_layers=[model.classifier], root_module_types=(nn.Conv2d, nn.Linear))
    plain = [[[(dep.target.name, dep.handler, list(idxs)) for dep, idxs in group] for group in groups]
             for groups in (ours, theirs)]
    assert plain[0] == plain[1] and len(ours) > 10 and not lost


def test_a_grouped_layer_that_reads_a_concatenation_is_taken_whole_or_not_at_all():
    """Channels of `a` lie in the first two of five groups, so no equal share of the five can leave it alone."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 10, 1), nn.Conv2d(3, 20, 1)
            self.c, self.d = nn.Conv2d(30, 30, 1, groups=5), nn.Conv2d(30, 4, 1)

        def forward(self, x):
            return self.d(self.c(torch.cat([self.a(x), self.b(x)], 1))).mean((2, 3))
    model = Net().eval()
    groups, lost = channel_groups(build_graph(model, torch.randn(1, 3, 8, 8)), [model.d])
    assert not lost
    assert {g[0].dep.target.module: is_consistent(g) for g in groups} == {model.a: False, model.b: False, model.c: True}


def test_maps_between_pixels_are_not_listed_channel_by_channel(monkeypatch):
    """Attention between pixels, whose maps a convolution mixes, as in EfficientFormerV2: millions of numbers there."""
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Conv2d(3, 8, 1) for _ in range(3))
            self.mix, self.out = nn.Conv2d(2, 2, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            b, _, h, w = x.shape
            q, k, v = (layer(x).reshape(b, 2, 4, h * w) for layer in (self.q, self.k, self.v))
            maps = self.mix(q.transpose(2, 3) @ k).softmax(-1)
            return self.out((maps @ v.transpose(2, 3)).transpose(2, 3).reshape(b, 8, h, w)).mean((2, 3))
    listed = []
    folding = tp.dependency.index_mapping._FlattenIndexMapping

    def fold(self, idxs, original=folding.__call__):
        listed.append(original(self, idxs))
        return listed[-1]
    monkeypatch.setattr(folding, '__call__', fold)
    model = Net().eval()
    groups, lost = channel_groups(build_graph(model, torch.randn(1, 3, 16, 16)), [model.out])
    assert [g[0].dep.target.module for g in groups] == [model.v]
    assert all('reshapes multiply them' in why for why in lost.values()) and {model.q, model.k} <= lost.keys()
    assert max(map(len, listed)) < 128 < 16 * 16


def test_models_that_cannot_be_pruned_say_why():
    with pytest.raises(LeanError, match='cannot trace'):
        prune_channels(model_of('resnet20_cifar'), torch.randn(1, 5, 32, 32))
    with pytest.raises(LeanError, match='image batch'):
        prune_channels(model_of('resnet20_cifar'), torch.randn(3, 32, 32))
    model = model_of('resnet20_cifar')
    with torch.no_grad():
        model.conv1.weight[0] = float('nan')
    with pytest.raises(LeanError, match='finite'):
        prune_channels(model, image('cifar'))
