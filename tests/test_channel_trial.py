"""Cuts that a network's own code does not survive are found by trying, and only those are left out."""
import copy
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_lean import LeanError
from timm_lean.pruning import prune_channels

sys.path.insert(0, str(Path(__file__).parents[1] / 'tools'))

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


# --- timm's own -------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize('name, share', [
    ('ecaresnet26t', 0.9), ('gcresnext26ts', 0.9), ('iformer_t', 0.9), ('mobilevit_xxs', 0.6), ('nextvit_small', 0.9),
    ('poolformer_s12', 0.7), ('res2net50_14w_8s', 0.7), ('rexnet_100', 0.6), ('skresnet18', 0.99),
    ('vit_tiny_patch16_224', 0.6)])
def test_family(name, share):
    """A part of `tools/channel_matrix.py`: pruned, reloaded bit for bit, with the features that it says."""
    from channel_matrix import ours
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    result = ours(model, torch.randn(1, 3, *(224, 224) if name.startswith('vit') else (64, 64)))
    assert result['result'] == 'pruned', result
    assert result['params'] < share
