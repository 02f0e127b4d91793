"""Calibration of whole networks: what it must keep, what it must improve, and what it must refuse."""
import copy
import weakref
from collections.abc import Sequence

import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomize_batchnorm

from timm_lean import LeanError, share
from timm_lean.calibration import Calibration, calibrate, input_covariances, insert_norms, output_errors, output_scores
from timm_lean.calibration.layers import LinearMap
from timm_lean.calibration.walk import Survey, Walk, hooked
from timm_lean.layers import FilterBasis
from timm_lean.models.resnet_cifar import CifarResNet
from timm_lean.pruning import prune_kernels
from timm_lean.sharing.groups import find_groups
from timm_lean.sharing.spectra import output_spectra


def network(seed=0, **kwargs):
    torch.manual_seed(seed)
    kwargs = {'layers': (2, 2), 'channels': (8, 16), **kwargs}
    return randomize_batchnorm(CifarResNet(**kwargs)).eval()


def pruned(model, amount=0.5):
    return prune_kernels(model, amount=amount)


@pytest.fixture(scope='module')
def images():
    """Smooth random images: neighbouring pixels are alike, as in photographs."""
    noise = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(noise, size=16, mode='bilinear')


@pytest.fixture(scope='module')
def unseen():
    noise = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(noise, size=16, mode='bilinear')


def error(model, original, x):
    with torch.no_grad():
        y = original(x)
        return float((model(x) - y).norm() / y.norm())


def test_pruned_kernels(images, unseen, device):
    original, images, unseen = network().to(device), images.to(device), unseen.to(device)
    model = pruned(original)
    before = copy.deepcopy(model.state_dict())
    new = calibrate(model, original, images.split(20))
    assert error(new, original, unseen) < 0.6 * error(model, original, unseen)
    for (name, a), b in zip(model.named_parameters(), new.parameters(), strict=True):
        if a.ndim == 4:
            assert torch.equal(a.flatten(2).any(2), b.flatten(2).any(2)), name
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert not new.training
    report = new.calibration_report
    assert (report.images, report.held_out) == (48, 16) and report.after < report.before
    assert report.after == pytest.approx(error(new, original, images[3::4]), rel=1e-4)
    assert all(layer.after <= layer.before for layer in report.layers)
    aims = {layer.name: layer.aim for layer in report.layers}
    assert aims['conv1'] == 'output' and aims['layer1.0.conv2'] == aims['layer2.1.conv2'] == 'sum'
    assert 'layer1.0.conv1' in str(report) and report.to_dict()['rounds'] == 1


def test_shared_bases(images, unseen, device):
    original, images, unseen = network().to(device), images.to(device), unseen.to(device)
    model = share(original, shared_rank=12, unique_rank=1)
    new = calibrate(model, original, [images])
    assert error(new, original, unseen) < 0.8 * error(model, original, unseen)
    bases = [m for m in new.modules() if isinstance(m, FilterBasis)]
    assert len({id(b.weight) for b in bases if b.num_filters == 12}) == 2
    assert new.layer1[0].conv1.basis is new.layer1[1].conv2.basis
    rows = new.layer1[0].conv1.basis.weight.detach().flatten(1)
    assert torch.allclose(rows @ rows.T, torch.eye(12, device=device), atol=1e-5)
    assert new.state_dict().keys() == model.state_dict().keys()


def test_what_loses_nothing_stays(images):
    original = network()
    for model in (original, pruned(original, 0), share(original, energy=1.)):
        new = calibrate(model, original, [images])
        assert error(new, original, images) < 1e-6
        assert error(new, original, images) <= error(model, original, images) + 1e-9


def test_ranks_by_the_energy_of_outputs(images, unseen):
    """The spectrum by hand for one layer, and a budget that is better spent than by the weights' energy."""
    original = network(channels=(8, 24))
    conv = original.layer1[0].conv1
    groups, _ = find_groups(original, False, None, 'layer1.0.conv1', None, alone=True, classifier=False)
    output_spectra(groups, original, [images], ridge=0., positions=256)
    spectrum = groups[0].kept['rows'].diff(prepend=torch.zeros(1)).sqrt()
    with torch.no_grad():
        x = original.act1(original.bn1(original.conv1(images)))
        y = conv(x).transpose(0, 1).flatten(1)
    y = y - y.mean(1, keepdim=True)
    expected = torch.linalg.svdvals(y.double())
    expected = expected / expected.norm()
    assert torch.allclose(spectrum[:3], expected[:3], rtol=0.1)  # from a sample of the positions
    data, weights = share(original, params=0.4, calibration=[images]), share(original, params=0.4)
    assert data.lean_report.params[1] <= 0.43 * data.lean_report.params[0]
    assert error(data, original, unseen) < error(weights, original, unseen)


def test_little_memory_means_fewer_images_for_the_first_layers(images, unseen):
    original = network()
    model = pruned(original)
    one = 8 * 16 * 16 * 4  # bytes of a map of the first stage
    new = calibrate(model, original, images.split(4), memory_limit=2 * 16 * 4 * one)
    samples = {layer.name: layer.samples for layer in new.calibration_report.layers}
    assert samples['conv1'] < samples['layer2.1.conv1'] and samples['fc'] == 48
    assert error(new, original, unseen) < error(model, original, unseen)


def test_outputs_that_have_no_room_judge_nothing(images):
    original = network()
    one = 4 * 4 * sum(tensor.numel() for tensor in original(images[:1]))  # bytes of the outputs of four images
    new = calibrate(pruned(original), original, images.split(16), memory_limit=2 * one)
    assert (new.calibration_report.images, new.calibration_report.held_out) == (48, 8)


class Prepared(Sequence):
    """Batches that are made when they are asked for."""

    def __init__(self, images):
        self.images, self.made = images, []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        batch = self.images[index] * 1
        self.made.append(weakref.ref(batch.untyped_storage()))
        return batch


def test_batches_of_a_sequence_are_not_kept(images):
    original = network()
    model = pruned(original)
    batches = Prepared(images.split(16))
    most = 0

    def watch(*_):
        nonlocal most
        most = max(most, sum(made() is not None for made in batches.made))

    original.conv1.register_forward_pre_hook(watch)
    one = 8 * 16 * 16 * 4  # bytes of a map of the first stage
    new = calibrate(model, original, batches, memory_limit=2 * 4 * one)
    assert 0 < most <= 2 < len(batches) < len(batches.made)
    expected = calibrate(model, original, images.split(16), memory_limit=2 * 4 * one)
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), expected.parameters(), strict=True))


def test_fewer_samples_than_inputs(images):
    """Images of an 8-dimensional space: 48 samples say all about 6,272 inputs that depend on them linearly."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Flatten(), nn.Linear(32 * 14 * 14, 20)).eval()
    model = copy.deepcopy(original)
    with torch.no_grad():
        model[0].weight[:, 1] = 0
    few = (torch.randn(64, 8) @ images[:8].flatten(1)).view(64, 3, 16, 16)
    new = calibrate(model, original, [few], ridge=1e-6)
    assert new.calibration_report.layers[-1].samples == 48
    assert error(new, original, few[3::4]) < 0.05 * error(model, original, few[3::4])


def _calibrate_half(rank, folder, images):
    torch.set_num_threads(1)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    original = network()
    new = calibrate(share(original, shared_rank=12), original, [images[32 * rank:][:32]])
    torch.save((new.state_dict(), new.calibration_report.to_dict()), f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_come_to_the_same(images, unseen, tmp_path):
    torch.multiprocessing.spawn(_calibrate_half, (str(tmp_path), images), nprocs=2)
    (one, report), (other, _) = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))
    original = network()
    alone = calibrate(share(original, shared_rank=12), original, images.split(32))
    assert report['after'] == pytest.approx(alone.calibration_report.after, rel=0.1)
    model = share(original, shared_rank=12)
    model.load_state_dict(one)
    assert error(model, original, unseen) == pytest.approx(error(alone, original, unseen), rel=0.1)


@pytest.mark.parametrize('name, sums', [('test_resnet', 4), ('test_efficientnet', 0), ('test_convnext', 0)])
def test_networks_of_timm(name, sums):
    """Shortcuts with a convolution, computed between a branch and the sum; depthwise, linear, attention."""
    torch.manual_seed(0)
    original = randomize_batchnorm(timm.create_model(name, num_classes=10)).eval()
    model = prune_kernels(original, amount=0.4)
    x = nn.functional.interpolate(torch.randn(32, 3, 8, 8), size=32, mode='bilinear')
    new = calibrate(model, original, [x], reestimate_bn=False)
    assert error(new, original, x[3::4]) < 0.9 * error(model, original, x[3::4])
    assert [layer.aim for layer in new.calibration_report.layers].count('sum') == sums


def test_frozen_layers_stay(images):
    original = network()
    model = pruned(original)
    model.layer1.requires_grad_(False)
    new = calibrate(model, original, [images])
    for (name, a), b in zip(model.layer1.state_dict().items(), new.layer1.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(model.layer2[1].conv2.weight, new.layer2[1].conv2.weight)


def test_kernels_chosen_by_what_they_do(images, unseen):
    """A kernel that reads a channel which is always 0 goes first, however large it is."""
    original = network()
    with torch.no_grad():
        original.bn1.weight[3] = 0
        original.bn1.bias[3] = -1
        original.layer1[0].conv1.weight[:, 3] *= 5
    new = prune_kernels(original, criterion='output', amount=0.3, scope='layer', calibration=[images])
    assert not bool(new.layer1[0].conv1.weight[:, 3].any())
    other = prune_kernels(original, criterion='random', amount=0.3, scope='layer', calibration=[images])
    assert error(new, original, unseen) < error(other, original, unseen)
    with pytest.raises(LeanError, match='needs calibration=LOADER'):
        prune_kernels(original, criterion='output', amount=0.3)
    with pytest.raises(LeanError, match='scores plain convolutions'):
        prune_kernels(share(original, shared_rank=8), criterion='output', amount=0.3, calibration=[images])


def test_scores_are_the_growth_of_the_error():
    """By brute force: take one kernel away and look at the output."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 4, 3, bias=False, groups=2).double()
    x = torch.randn(8, 4, 6, 6, dtype=torch.float64)
    scores = output_scores(nn.Sequential(conv), ['0'], [x], ridge=0.)['0']
    growth = torch.zeros(4, 2, dtype=torch.float64)
    y = conv(x)
    for o in range(4):
        for c in range(2):
            less = copy.deepcopy(conv)
            with torch.no_grad():
                less.weight[o, c] = 0
                lost = (y - less(x))[:, o]
            growth[o, c] = (lost - lost.mean()).square().sum()
    assert torch.allclose(scores, growth / growth.mean(), rtol=1e-9)


class Channels(nn.Module):
    """A depthwise and a grouped convolution, a linear layer called three times, and a convolution with a bias."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.pair = nn.Conv2d(width, width, 3, groups=2)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.norm(self.depth(self.stem(x).relu())).relu()
        x = self.pair(x).relu()
        return [self.head(part.mean((2, 3))) for part in (x, x[:, :, ::2], x[:, :, :, :3])]


def test_lost_channels_need_kept(images, unseen):
    torch.manual_seed(0)
    original = randomize_batchnorm(Channels()).eval()
    kept = [0, 2, 3, 4, 5, 7]
    model = Channels(6)
    state = original.state_dict()
    with torch.no_grad():
        for name in ('stem', 'depth', 'norm'):
            for key, value in getattr(model, name).state_dict().items():
                value.copy_(state[f'{name}.{key}'][kept] if value.ndim else state[f'{name}.{key}'])
        model.pair.weight.copy_(state['pair.weight'][kept][:, [0, 2, 3]])
        model.pair.bias.copy_(state['pair.bias'][kept])
        model.head.weight.copy_(state['head.weight'][:, kept])
        model.head.bias.copy_(state['head.bias'])
    model.eval()
    with pytest.raises(LeanError, match=r'stem has 6 of the 8 output channels of the original.*kept='):
        calibrate(model, original, [images])
    new = calibrate(model, original, [images], kept=dict.fromkeys(('stem', 'depth', 'pair'), kept))

    def lost(net):
        with torch.no_grad():
            return sum(float((a - b).square().sum()) for a, b in zip(net(unseen), original(unseen), strict=True))
    assert lost(new) < 0.5 * lost(model)


@pytest.mark.parametrize('batches, message', [
    ([], 'needs images'), ([torch.zeros(3, 3, 16, 16)], 'at least 4'), (['x'], 'got str'),
    ([torch.full((8, 3, 16, 16), torch.nan)], 'NaN'), ([torch.zeros(8, 1, 16, 16)], 'does not take'),
    ([torch.zeros(8, 3, 16, 16, dtype=torch.uint8)], 'uint8'), (torch.zeros(8, 3, 16, 16), 'one tensor')])
def test_unusable_images(batches, message):
    original = network()
    with pytest.raises(LeanError, match=message):
        calibrate(pruned(original), original, batches)


@pytest.mark.parametrize('batch', [
    torch.randn(1, 3, 16, 16).repeat(8, 1, 1, 1), torch.rand(8, 3, 1, 1).expand(-1, -1, 16, 16),
    torch.zeros(8, 3, 16, 16), torch.randn(5, 3, 16, 16),
], ids=['one image repeated', 'one colour', 'black', 'five images'])
def test_poor_images_do_no_harm(batch):
    original = network()
    model = pruned(original)
    report = calibrate(model, original, [batch]).calibration_report
    assert report.after <= report.before


def test_images_of_two_sizes_and_a_network_that_takes_one(images):
    original = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 5))
    with pytest.raises(LeanError, match=r'does not take the calibration images.*3, 12, 12'):
        calibrate(original, original, [images[:8], images[:8, :, :12, :12]])
    original = network()
    assert calibrate(pruned(original), original, [images, images[:8, :, :12, :12]]).calibration_report.rounds == 1


def test_a_batch_of_one_image_and_one_value_for_a_batch_norm():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).eval()
    insert_norms(model, ['3'], torch.rand(8, 3, 8, 8).split(2))
    with pytest.raises(LeanError, match='batches of at least 2 images'):
        insert_norms(model, ['3'], torch.rand(4, 3, 8, 8).split(1))


def test_half_precision_comes_last(images):
    original = network()
    with pytest.raises(LeanError, match=r'conv1.weight is float16: calibrate\(\), then half\(\)'):
        calibrate(pruned(original).half(), original, [images])


def test_too_little_memory(images, monkeypatch):
    original = network()

    def full(*args):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')
    monkeypatch.setattr(LinearMap, 'inputs', full)
    with pytest.raises(LeanError, match=r'memory_limit=1\.4e\+09 bytes.*lower it'):
        calibrate(pruned(original), original, [images])


@pytest.mark.parametrize('verb', [
    lambda model, images: output_errors([model], model, images),
    lambda model, images: list(input_covariances(model, ['conv1'], images)),
    lambda model, images: insert_norms(model, ['bn1'], images),
    lambda model, images: calibrate(pruned(model), model, images)])
def test_too_little_memory_for_a_forward_pass(images, monkeypatch, verb):
    model = network()

    def full(*args):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB')
    model.conv1.register_forward_pre_hook(full)
    with pytest.raises(LeanError, match=r'ran out of memory with memory_limit=1\.4e\+09 bytes'):
        verb(model, [images])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(self.a(x)) + self.norm(self.b(x.relu())) + self.c(x)


def test_tied_weights_and_a_batch_norm_of_two_layers_stay(images):
    original = Tied().eval()
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.c.weight[:, 0] = 0
        model.a.weight[:, 0] = 0
    new = calibrate(model, original, [images], reestimate_bn=False)
    assert new.a.weight is new.b.weight and torch.equal(new.a.weight, model.a.weight)
    assert torch.equal(new.norm.running_mean, model.norm.running_mean)
    assert error(new, original, images) < error(model, original, images)


def test_another_original(images):
    with pytest.raises(LeanError, match=r"no layer 'layer2\.1\.conv1'"):
        calibrate(pruned(network()), network(layers=(2, 1)), [images])


def test_an_original_with_other_weights(images):
    """Trained apart, or another classifier; a network that has been trained or calibrated since is fine."""
    original = network()
    model = pruned(original)
    with pytest.raises(LeanError, match=r"weights of 'conv1' are not those of the original"):
        calibrate(model, network(seed=1), [images])
    other = copy.deepcopy(original)
    nn.init.normal_(other.fc.weight)
    with pytest.raises(LeanError, match=r"weights of 'fc' are not.*0 other layers"):
        calibrate(model, other, [images])
    again = calibrate(calibrate(model, original, [images]), original, [images])
    assert error(again, original, images) < error(model, original, images)


class Detector(nn.Module):
    """A head shared by levels of a pyramid, another for boxes of one level, and a forward that asks for more."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.down = nn.Conv2d(8, 8, 3, 2, 1)
        self.head = nn.Conv2d(8, 8, 3, padding=1)
        self.boxes = nn.Linear(8, 4)

    def forward(self, inputs, samples, mode):
        assert mode == 'tensor'
        levels = [self.stem(inputs).relu()]
        levels.append(self.down(levels[0]).relu())
        rois = torch.cat([levels[0][[i], :, y:y + 3, x:x + 3] for i, rows in enumerate(samples) for y, x in rows])
        return {'scores': tuple(self.head(level) for level in levels), 'boxes': self.boxes(rois.mean((2, 3)))}


def test_a_network_with_a_forward_of_its_own(images):
    """Batches are not looked into; a head that is called twice, and one that sees another number of rows."""
    torch.manual_seed(0)
    original = Detector().eval()
    model = prune_kernels(original, amount=0.4)
    batches = [{'inputs': x, 'samples': [[(0, 1), (2, 3)], [(4, 4)], [], [(1, 1)]]} for x in images.split(4)]

    def forward(network, batch):
        return network(**batch, mode='tensor')

    new = calibrate(model, original, batches, forward=forward)
    report = new.calibration_report
    assert (report.images, report.held_out) == (48, 16)
    assert {layer.name: layer.samples for layer in report.layers}['boxes'] == 12 * 4
    with torch.no_grad():
        before, after = (sum(float((a - b).square().sum()) for batch in batches[3::4] for a, b in zip(
            forward(compressed, batch)['scores'], forward(original, batch)['scores'], strict=True))
            for compressed in (model, new))
    assert after < 0.7 * before and report.after < report.before
    again = prune_kernels(original, amount=0.4, calibration=Calibration(batches, forward, positions=20))
    assert again.calibration_report.after < report.before
    assert all(layer.samples <= 48 * 2 * 20 for layer in again.calibration_report.layers)
    for wrong, message in ((batches[:3], 'every fourth is held out'), ([{'inputs': images}] * 4, 'run by forward=')):
        with pytest.raises(LeanError, match=message):
            calibrate(model, original, wrong, forward=forward)


@pytest.mark.parametrize('options, message', [
    ({'positions': 0}, 'positions of calibration'), ({'rounds': 1.5}, 'rounds of'), ({'ridge': -1}, 'ridge of'),
    ({'memory_limit': float('nan')}, 'memory_limit of')])
def test_options_that_cannot_be_meant(images, options, message):
    with pytest.raises(LeanError, match=message):
        calibrate(network(), network(), [images], **options)


def test_labels_are_not_looked_at_and_batches_do_not_matter(images):
    original = network()
    model = pruned(original)
    one = calibrate(model, original, [(images, object())], reestimate_bn=False)
    again = calibrate(model, original, [[images, None]], reestimate_bn=False)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize('name, ends', [
    ('resnet10t', ['layer1.0.conv2', 'layer2.0.conv2', 'layer3.0.conv2', 'layer4.0.conv2']),
    ('regnetx_002', [f's{s}.b{b}.conv3.conv' for s, n in enumerate((1, 1, 4, 7), 1) for b in range(1, n + 1)]),
    ('mobilenetv2_035', [
        f'blocks.{s}.{b}.conv_pwl' for s, n in enumerate((1, 2, 3, 4, 3, 3, 1)) for b in range(1, n)]),
    # attention stands between the last convolution and the sum
    ('seresnet18', [f'layer{s}.0.downsample.0' for s in (2, 3, 4)])])
def test_the_last_layers_of_residual_branches(name, ends):
    model = timm.create_model(name).eval()
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert list(Survey().run(model, convs, lambda: model(torch.randn(2, 3, 64, 64))).joins) == ends


def test_a_walk_stops_where_it_is_told():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(4, 3)
    with hooked(['0', '2'], model):
        walk = Walk(lambda: model(x))
        stop = walk.to('2')
        assert torch.equal(stop.inputs, model[:2](x))
        with torch.no_grad():
            model[2].weight.zero_()  # what comes later sees the new weights
        assert torch.equal(walk.to('2', where='after').outputs, model[2].bias.expand(4, 2))
        assert walk.to('0') is None
        given_up = Walk(lambda: model(x))
        given_up.to('0')
        given_up.close()
    assert not model[0]._forward_hooks
