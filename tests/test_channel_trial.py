"""Cuts that a network's own code does not survive are found by trying, and only those are left out."""
import copy
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomize_batchnorm
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import LayerNorm2d, ScaledStdConv2d

from timm_lean import LeanError, load_model, save_model
from timm_lean.pruning import prune_channels

NAMES = ['a', 'b', 'c', 'd']


class Fixed(nn.Module):
    """Four convolutions side by side, some of which together must have so many channels."""

    def __init__(self, needs=(), looks=False):
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Conv2d(3, 8, 1))
        self.norm = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 5)
        self.needs, self.looks = needs, looks

    def forward(self, x):
        maps = {name: getattr(self, name)(x) for name in NAMES}
        for names, count in self.needs:
            if sum(maps[name].shape[1] for name in names) < count:
                raise ValueError(f'{names} must have {count} channels')
        y = self.norm(torch.cat(list(maps.values()), 1))
        if self.looks and float(y.sum()) == 0:
            return self.fc(y.mean((2, 3)) + 1)
        return self.fc(y.mean((2, 3)))


def pruned(model):
    return prune_channels(model.eval(), torch.randn(1, 3, 4, 4), pruning_ratio=0.5, round_to=4, exclude='fc')


@given(st.lists(st.tuples(st.sets(st.sampled_from(NAMES), min_size=1), st.integers(1, 32)), max_size=3))
@settings(max_examples=20, deadline=None)
def test_what_is_cut_keeps_to_the_code_and_nothing_else_is_left(needs):
    """By arithmetic: every need is met, and one layer more would not have met one."""
    needs = [(sorted(names), min(count, 8 * len(names))) for names, count in needs]

    def runs(cut):
        return all(sum(4 if name in cut else 8 for name in names) >= count for names, count in needs)
    model = Fixed(needs)
    before = copy.deepcopy(model.state_dict())
    if not any(runs({name}) for name in NAMES):
        with pytest.raises(LeanError, match=r'cannot run with fewer channels anywhere: a: .*must have'):
            pruned(model)
    else:
        new = pruned(model)
        cut = {name for name, *_ in new.lean_report.layers}
        fixed = {name for name, why in new.lean_report.unchanged if 'code fixes its channels (ValueError' in why}
        assert runs(cut) and cut | fixed == set(NAMES) and not cut & fixed
        assert not any(runs(cut | {name}) for name in fixed)
        assert {name: getattr(new, name).out_channels for name in NAMES} == {
            name: 4 if name in cut else 8 for name in NAMES}
        assert new.fc.in_features == new.norm.num_features == 32 - 4 * len(cut)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_code_that_looks_at_values_is_tried_with_values():
    assert {name for name, *_ in pruned(Fixed([(['b'], 8)], looks=True)).lean_report.layers} == {'a', 'c', 'd'}


def test_later_steps_meet_the_same_code():
    model = Fixed([(['b'], 8), (['c'], 6)]).eval()
    new = prune_channels(model, torch.randn(1, 3, 4, 4), pruning_ratio=0.5, round_to=1, iterative_steps=2)
    assert [getattr(new, name).out_channels for name in NAMES] == [4, 8, 6, 4]
    assert dict(new.lean_report.unchanged).keys() == {'b', 'c'}


def test_channels_that_attention_compares_with_their_neighbours_stay():
    model, x = timm.create_model('ecaresnet26t', channels=(16, 16, 16, 16)).eval(), torch.randn(1, 3, 32, 32)
    new = prune_channels(model, x, pruning_ratio=0.5)
    widths = {name: m.out_channels for name, m in new.named_modules() if isinstance(m, nn.Conv2d)}
    old = {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert all(widths[n] == old[n] for n in old if n.startswith('layer') and n.endswith(('conv3', 'downsample.1.conv')))
    assert all(widths[n] < old[n] for n in old if n.startswith('layer') and n.endswith(('conv1', 'conv2')))
    assert any('ECA' in why for _, why in new.lean_report.unchanged)
    assert new(x).shape == (1, 1000)


def test_gains_of_standardized_filters_leave_with_them(tmp_path):
    model, x = timm.create_model('test_nfnet').eval(), torch.randn(1, 3, 64, 64)
    gains = {n: m.gain for n, m in model.named_modules() if isinstance(m, ScaledStdConv2d)}
    for gain in gains.values():
        nn.init.uniform_(gain)
    new = prune_channels(model, x, pruning_ratio=0.5)
    for name, gain in gains.items():
        kept = new.lean_report.kept.get(name, range(len(gain)))
        assert torch.equal(new.get_submodule(name).gain, gain[list(kept)])
    assert sum(len(new.get_submodule(name).gain) for name in gains) < 0.7 * sum(map(len, gains.values()))
    save_model(new, tmp_path / 'm.safetensors')
    assert torch.equal(load_model(tmp_path / 'm.safetensors').eval()(x), new(x))


# --- timm's own -------------------------------------------------------------------------------------------------------

def affine(layer, x):
    """A norm over channels without its statistics, which channels of zeros would change."""
    last = isinstance(layer, nn.LayerNorm) and not isinstance(layer, LayerNorm2d)
    shape = (-1,) if last else (-1, 1, 1)
    return x * layer.weight.view(shape) + layer.bias.view(shape)


@torch.no_grad()
def silence(model, report):
    """Set to zero what makes or reads the channels that the report says are gone."""
    for name, kept in report.kept.items():
        layer = model.get_submodule(name)
        gone = sorted(set(range(len(layer.weight))) - set(kept))
        for key in ('weight', 'bias', 'running_mean'):
            if isinstance(tensor := getattr(layer, key, None), torch.Tensor):
                tensor[gone] = 0
    for name, kept in report.kept_inputs.items():
        layer = model.get_submodule(name)
        if getattr(layer, 'groups', 1) == 1:
            layer.weight[:, sorted(set(range(layer.weight.shape[1])) - set(kept))] = 0


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize('name, share', [
    ('cs3darknet_s', 0.6), ('ecaresnet26t', 0.7), ('gcresnext26ts', 0.6), ('iformer_t', 0.7), ('mobilevit_xxs', 0.6),
    ('nextvit_small', 0.7), ('res2net50_14w_8s', 0.7), ('rexnet_100', 0.6), ('shvit_s1', 0.7), ('skresnet18', 0.99),
    ('vit_tiny_patch16_224', 0.6)])
def test_family(name, share, tmp_path):
    """The pruned network does what the original does with the removed channels at zero, and comes back bit for bit."""
    torch.manual_seed(0)
    model = randomize_batchnorm(timm.create_model(name)).eval()
    x = torch.randn(1, 3, *(224, 224) if name.startswith('vit') else (64, 64))
    new = prune_channels(model, x, pruning_ratio=0.5)
    before, after = new.lean_report.params
    assert after < share * before
    save_model(new, tmp_path / 'm.safetensors')
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / 'm.safetensors').eval()(x), new(x))
        silence(model, new.lean_report)
        for layer in [*model.modules(), *new.modules()]:
            if isinstance(layer, (nn.LayerNorm, nn.GroupNorm)):
                layer.forward = partial(affine, layer)
        torch.testing.assert_close(new(x), model(x), atol=1e-4 * float(model(x).abs().max()), rtol=1e-3)
