"""Every technique after every other: it works and rebuilds bit for bit, or says which order does."""
import itertools

import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomize_batchnorm

from timm_lean import LeanError, compact, fold, load_model, prune_channels, prune_kernels, save_model, share
from timm_lean.pruning import kernel_report

X = torch.zeros(1, 3, 32, 32)
NETWORKS = {'resnet20_cifar': dict(layers=[2, 2, 2]), 'resnet10t': dict(channels=[16, 32, 64, 128])}
VERBS = {
    'share': lambda m: share(m, shared_rank=6),
    'prune_kernels': lambda m: prune_kernels(m, amount=0.5),
    'prune_channels': lambda m: prune_channels(m, X, pruning_ratio=0.25, round_to=4),
    'compact': lambda m: compact(m, X),
    'fold': fold,
}
REFUSED = {
    ('prune_kernels', 'share'): r'share\(\), then prune_kernels\(\)',
    ('prune_kernels', 'prune_kernels'): 'again=True',
    ('share', 'share'): 'nothing to share',
    ('fold', 'fold'): r'share\(\), then fold\(\)',
}
# its shortcuts pad channels with zeros, so that most layers keep their inputs, and with them all that share
REFUSED_WITH_PADDING = {('share', 'prune_channels'): r'prune_channels\(\), then share\(\)'}


@pytest.fixture(scope='module')
def after_first() -> dict[tuple[str, str, bool], nn.Module]:
    return {}


def first_step(known: dict, name: str, verb: str, shared: bool) -> nn.Module:
    key = name, verb, shared
    if key not in known:
        torch.manual_seed(0)
        model = randomize_batchnorm(timm.create_model(name, num_classes=5, **NETWORKS[name])).eval()
        steps = [verb] if not shared else ['prune_channels', 'share'] if verb == 'prune_channels' else ['share', verb]
        for step in steps:
            model = VERBS[step](model)
        known[key] = model
    return known[key]


@pytest.mark.parametrize('first, second', list(itertools.product(VERBS, VERBS)))
@pytest.mark.parametrize('name', NETWORKS)
def test_pair(name, first, second, after_first, tmp_path):
    """What is folded must be shared before, so pairs with `fold` have a shared network between or before them."""
    model = first_step(after_first, name, first, shared='fold' in (first, second) and first != 'share')
    refused = REFUSED | (REFUSED_WITH_PADDING if name == 'resnet20_cifar' else {})
    if (first, second) in refused:
        with pytest.raises(LeanError, match=refused[first, second]):
            VERBS[second](model)
        return
    new = VERBS[second](model)
    x = torch.randn(2, 3, 32, 32)
    save_model(new, tmp_path / 'm.safetensors')
    assert torch.equal(load_model(tmp_path / 'm.safetensors')(x), new(x))
    if first in ('share', 'prune_kernels') and second in ('compact', 'fold'):
        torch.testing.assert_close(new(x), model(x), rtol=1e-3, atol=1e-4)
    if 'prune_kernels' in (first, second) and 'fold' not in (first, second):
        assert kernel_report(new).share > 0.3, 'pruned kernels came back'
