"""Every technique after every other: it works and rebuilds bit for bit, or says which order does."""
import itertools
import re

import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomize_batchnorm

import timm_lean
from timm_lean import LeanError, compact, fold, load_model, prune_kernels, save_model, share
from timm_lean.export.forms import half
from timm_lean.pruning import kernel_report

NETWORKS = {  # one whose shortcuts pad channels with zeros, one with convolutions there
    'resnet20_cifar': {'layers': (2, 2, 2), 'channels': (8, 16, 16)},
    'resnet10t': {'layers': (1, 2, 2, 1), 'channels': (16, 16, 16, 16)},
}
X = nn.functional.interpolate(torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)), size=32)
CALIBRATED = {
    'share': lambda m, c: share(m, shared_rank=6, calibration=c),
    'prune_kernels': lambda m, c: prune_kernels(m, amount=0.5, calibration=c),
    'prune_channels': lambda m, c: timm_lean.prune_channels(m, X[:1], pruning_ratio=0.25, round_to=4, calibration=c),
    'remove_blocks': lambda m, c: timm_lean.remove_blocks(m, blocks=['layer2.1'], calibration=c),
}
VERBS = {
    **{name: lambda m, verb=verb: verb(m, None) for name, verb in CALIBRATED.items()},
    'compact': lambda m: compact(m, X[:1]),
    'fold': fold,
    'half': half,
}
REFUSED = {
    ('prune_kernels', 'share'): r'share\(\), then prune_kernels\(\)',
    ('prune_kernels', 'prune_kernels'): 'again=True',
    ('share', 'share'): 'nothing to share',
    ('fold', 'fold'): r'share\(\), then fold\(\)',
    ('remove_blocks', 'remove_blocks'): "no removable block 'layer2.1'",
    **{('half', verb): rf'{verb}\(\), then half\(\)' for verb in (
        'share', 'prune_channels', 'remove_blocks', 'compact')},
}
# its shortcuts pad channels with zeros, so that most layers keep their inputs, and with them all that share
REFUSED_WITH_PADDING = {('share', 'prune_channels'): r'prune_channels\(\), then share\(\)'}


@pytest.fixture(scope='module')
def known() -> dict[tuple[str, ...], nn.Module]:
    return {}


def network(known: dict, name: str, *verbs: str) -> nn.Module:
    """A network after some steps, made once."""
    key = name, *verbs
    if key not in known:
        if verbs:
            known[key] = VERBS[verbs[-1]](network(known, name, *verbs[:-1]))
        else:
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=5, **NETWORKS[name])
            known[key] = randomize_batchnorm(model).eval()
    return known[key]


def refusal(name: str, *verbs: str) -> str | None:
    """What the last step of some is refused by, the others having been taken."""
    refused = REFUSED | (REFUSED_WITH_PADDING if name == 'resnet20_cifar' else {})
    return next((refused[first, verbs[-1]] for first in verbs[:-1] if (first, verbs[-1]) in refused), None)


def first_steps(first: str, second: str) -> list[str]:
    """What is folded must be shared before, so pairs with `fold` have a shared network between or before them."""
    if 'fold' not in (first, second) or first == 'share':
        return [first]
    return ['prune_channels', 'share'] if first == 'prune_channels' else ['share', first]


TWO_NETWORKS = pytest.mark.parametrize('name', ['resnet20_cifar', pytest.param('resnet10t', marks=pytest.mark.slow)])


@pytest.mark.parametrize('first, second', list(itertools.product(VERBS, VERBS)))
@TWO_NETWORKS
def test_pair(name, first, second, known, tmp_path):
    model = network(known, name, *first_steps(first, second))
    message = refusal(name, first, second)
    if message:
        with pytest.raises(LeanError, match=message):
            VERBS[second](model)
        return
    new = VERBS[second](model)
    x = X[:2].to(next(new.parameters()).dtype)
    save_model(new, tmp_path / 'm.safetensors')
    assert torch.equal(load_model(tmp_path / 'm.safetensors').to(x.dtype)(x), new(x))
    if first in ('share', 'prune_kernels') and second in ('compact', 'fold'):
        torch.testing.assert_close(new(x), model(x), rtol=1e-3, atol=1e-4)
    if 'prune_kernels' in (first, second) and 'fold' not in (first, second):
        assert kernel_report(new).share > 0.3, 'pruned kernels came back'


@pytest.mark.parametrize('first, second', list(itertools.product(VERBS, CALIBRATED)))
@pytest.mark.slow
@pytest.mark.parametrize('name', NETWORKS)
def test_pair_calibrated(name, first, second, known, tmp_path):
    """The second step is calibrated: never further from the network before it than without."""
    model = network(known, name, *first_steps(first, second))
    message = r'calibrate\(\), then half\(\)' if (first, second) == ('half', 'prune_kernels') else refusal(
        name, first, second)
    if message:
        with pytest.raises(LeanError, match=message):
            CALIBRATED[second](model, [X])
        return
    new = CALIBRATED[second](model, [X])
    assert new.calibration_report.after <= new.calibration_report.before
    save_model(new, tmp_path / 'm.safetensors')
    assert torch.equal(load_model(tmp_path / 'm.safetensors')(X), new(X))


@pytest.mark.slow
@pytest.mark.parametrize('verbs', list(itertools.permutations(VERBS, 3)), ids='-'.join)
@pytest.mark.parametrize('name', NETWORKS)
def test_triple(name, verbs, known, tmp_path):
    """Three different steps, or a clear error that names an order."""
    model, messages = network(known, name), {**REFUSED, **REFUSED_WITH_PADDING}
    for count in range(1, 4):
        try:
            model = network(known, name, *verbs[:count])
        except LeanError as e:
            expected = [text for pair, text in messages.items()
                        if pair[1] == verbs[count - 1] and pair[0] in (*verbs[:count - 1], 'fold')]
            assert any(re.search(text, str(e)) for text in expected), f'{verbs[:count]}: {e}'
            return
    x = X[:2].to(next(model.parameters()).dtype)
    save_model(model, tmp_path / 'm.safetensors')
    assert torch.equal(load_model(tmp_path / 'm.safetensors').to(x.dtype)(x), model(x))
