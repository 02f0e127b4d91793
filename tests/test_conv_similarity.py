"""Convolutional Similarity against its definition, and the initialization by it."""
import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from timm_lean import LeanError
from timm_lean.layers.filter_banks import find_filter_banks
from timm_lean.regularizers import (
    ConvSimilarity,
    conv_similarity,
    create_regularizer,
    initialize_conv_similarity,
)

MODULE = importlib.import_module('timm_lean.regularizers.conv_similarity')  # the package exports a function so named


def cross_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """All overlapping shifts of `b` against `a`, by the definition."""
    kh, kw = a.shape
    out = np.zeros((2 * kh - 1, 2 * kw - 1))
    for dy in range(-kh + 1, kh):
        for dx in range(-kw + 1, kw):
            for y in range(kh):
                for x in range(kw):
                    if 0 <= y + dy < kh and 0 <= x + dx < kw:
                        out[dy + kh - 1, dx + kw - 1] += a[y, x] * b[y + dy, x + dx]
    return out


def brute_force(weight: np.ndarray, groups: int, pairs: str) -> float:
    per_group = len(weight) // groups
    result = 0.0
    for group in np.split(weight, groups):
        chosen = (itertools.combinations(range(per_group), 2) if pairs == 'all'
                  else zip(range(per_group - 1), range(1, per_group), strict=True))
        for i, j in chosen:
            for a, b in zip(group[i], group[j], strict=True):
                result += (cross_correlation(a, b) ** 2).sum()
    return result


KERNELS = [(1, 1), (3, 3), (5, 5), (7, 7), (1, 3), (3, 1)]


@pytest.mark.parametrize('pairs', ['all', 'adjacent'])
@pytest.mark.parametrize('kernel', KERNELS)
@pytest.mark.parametrize('groups', [1, 2])
def test_equals_brute_force(kernel, groups, pairs, device):
    weight = torch.randn(6, 2, *kernel, dtype=torch.float64)
    expected = brute_force(weight.numpy(), groups, pairs)
    assert conv_similarity(weight.to(device), groups, pairs).item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(groups=st.integers(1, 3), filters=st.integers(1, 4), channels=st.integers(1, 3),
       kernel=st.sampled_from([(1, 1), (3, 3), (5, 5), (1, 3), (2, 3), (7, 7)]),
       pairs=st.sampled_from(['all', 'adjacent']), seed=st.integers(0, 99), exponent=st.integers(-3, 1))
def test_equals_brute_force_hypothesis(groups, filters, channels, kernel, pairs, seed, exponent):
    if kernel == (7, 7):
        filters, channels = min(filters, 2), 1
    weight = np.random.default_rng(seed).normal(size=(groups * filters, channels, *kernel)) * 10.0 ** exponent
    expected = brute_force(weight, groups, pairs)
    assert conv_similarity(torch.from_numpy(weight), groups, pairs).item() == pytest.approx(expected, rel=1e-10)


def test_adjacent_equals_sliding_convolution():
    """An independent definition: each filter slid over its padded neighbour, channel by channel."""
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    padded = nn.functional.pad(weight, (2, 2, 2, 2))
    patches = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # [5, 3, 5, 5, 3, 3]
    maps = torch.einsum('mcyxhw,mchw->mcyx', patches[:-1], weight[1:])
    assert conv_similarity(weight, pairs='adjacent').item() == pytest.approx(maps.square().sum().item(), rel=1e-12)


def test_full_convolution_inner_product_is_the_correlation_identity():
    """`<w_i * x, w_j * x> = sum_s r_ij[s] a_x[s]` for "full" convolution, which is what makes r_ij the right thing."""
    rng = np.random.default_rng(0)
    image, kernels = rng.normal(size=(8, 8)), rng.normal(size=(2, 3, 3))
    maps = nn.functional.conv2d(torch.from_numpy(image)[None, None], torch.from_numpy(kernels)[:, None], padding=2)[0]
    inner = (maps[0] * maps[1]).sum().item()
    centre = slice(8 - 3, 8 + 2)  # the shifts a 3 x 3 kernel can see
    auto = cross_correlation(image, image)[centre, centre]
    cross = cross_correlation(kernels[0], kernels[1])
    assert inner == pytest.approx((cross * auto).sum(), rel=1e-12)
    bound = np.linalg.norm(cross) * np.linalg.norm(auto)
    assert abs(inner) <= bound
    weight = torch.from_numpy(kernels)[:, None]
    assert conv_similarity(weight).item() == pytest.approx((cross ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize('pairs', ['all', 'adjacent'])
@pytest.mark.parametrize('shape,groups', [((6, 2, 3, 3), 2), ((4, 3, 1, 1), 1), ((3, 2, 1, 3), 1), ((2, 1, 5, 5), 1)])
def test_gradcheck(shape, groups, pairs):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: conv_similarity(w, groups, pairs, normalize=True), (weight,))


def direct_all_pairs(weight: torch.Tensor) -> torch.Tensor:
    """All pairs by convolution and autograd, quadratic in the number of filters."""
    padding = [k - 1 for k in weight.shape[2:]]
    result = weight.new_zeros(())
    for c in range(weight.shape[1]):
        kernel = weight[:, c:c + 1]
        maps = nn.functional.conv2d(kernel, kernel, padding=padding).square().sum((2, 3))
        result = result + (maps.sum() - maps.diagonal().sum()) / 2
    return result


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7)
        self.a = nn.Conv2d(8, 40, 3)
        self.b = nn.Conv2d(40, 40, 3)
        self.point = nn.Conv2d(40, 16, 1, bias=False)
        self.wide = nn.Conv2d(16, 8, (1, 3))


def test_model_sum_and_gradient_in_chunks(monkeypatch):
    """Many chunks, across layers and within them, give the sum over layers and its gradient, in fp32."""
    monkeypatch.setattr(MODULE, '_CHUNK_LEAST', 500)
    model = Net()
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    expected = sum(direct_all_pairs(m.weight.double()) for m in convs)
    expected.backward()
    grads = [m.weight.grad.clone() for m in convs]
    model.zero_grad()
    value = create_regularizer('conv_similarity', normalize=False)(model)
    value.backward()
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected.item(), rel=1e-5)
    for conv, grad in zip(convs, grads, strict=True):
        torch.testing.assert_close(conv.weight.grad, grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())


def test_grouped_pieces_in_chunks(monkeypatch):
    weight = torch.randn(24, 5, 3, 3, dtype=torch.float64, requires_grad=True)  # 4 groups of 6 filters, 5 channels
    whole = conv_similarity(weight, 4)
    grad, = torch.autograd.grad(whole, weight)
    for least in (1, 6 * 9 * 2, 6 * 9 * 5, 6 * 9 * 12):
        monkeypatch.setattr(MODULE, '_CHUNK_LEAST', least)
        monkeypatch.setattr(MODULE, '_SHARE', 10 ** 9)
        again = conv_similarity(weight, 4)
        assert again.item() == pytest.approx(whole.item(), rel=1e-12)
        torch.testing.assert_close(torch.autograd.grad(again, weight)[0], grad)


@pytest.mark.parametrize('layout', ['channels_last', 'transposed', 'bfloat16'])
def test_layouts_and_dtypes(layout):
    weight = torch.randn(6, 4, 3, 3)
    odd = {'channels_last': lambda: weight.to(memory_format=torch.channels_last),
           'transposed': lambda: weight.transpose(2, 3).contiguous().transpose(2, 3),
           'bfloat16': lambda: weight.bfloat16()}[layout]().requires_grad_()
    plain = odd.detach().float().contiguous().requires_grad_()
    with torch.autocast('cpu', torch.bfloat16):  # the maths stays in fp32
        value = conv_similarity(odd)
        value.backward()
    expected = conv_similarity(plain)
    expected.backward()
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected.item(), rel=1e-6)
    assert odd.grad.dtype == odd.dtype
    torch.testing.assert_close(odd.grad.float(), plain.grad, rtol=1e-2 if layout == 'bfloat16' else 1e-5, atol=1e-4)


def test_a_retained_graph_gives_the_same_gradient_again():
    weight = torch.randn(6, 4, 3, 3, requires_grad=True)
    value = conv_similarity(weight)
    first, = torch.autograd.grad(3 * value, weight, retain_graph=True)
    second, = torch.autograd.grad(value, weight, retain_graph=True)
    torch.testing.assert_close(first, 3 * second)
    with torch.no_grad():
        assert conv_similarity(weight).item() == value.item()


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    compiled = torch.compile(lambda w: conv_similarity(w) * 2, backend='aot_eager', fullgraph=True)
    compiled(weight).backward()
    grad = weight.grad.clone()
    weight.grad = None
    (conv_similarity(weight) * 2).backward()
    torch.testing.assert_close(grad, weight.grad)


def test_normalize_is_the_mean_over_triples():
    weight = torch.randn(8, 2, 3, 3, dtype=torch.float64)  # 2 groups of 4 filters and 2 channels
    for pairs, number in (('all', 6), ('adjacent', 3)):
        raw, mean = conv_similarity(weight, 2, pairs), conv_similarity(weight, 2, pairs, normalize=True)
        assert mean.item() == pytest.approx(raw.item() / (2 * number * 2))


def test_depthwise_compares_nothing():
    depthwise = nn.Conv2d(8, 8, 3, groups=8)
    assert conv_similarity(depthwise.weight, 8).item() == 0
    with pytest.raises(LeanError, match='no two filters'):
        ConvSimilarity()(nn.Sequential(depthwise))
    model = nn.Sequential(depthwise, nn.Conv2d(8, 4, 1))
    value = ConvSimilarity(normalize=False)(model)
    value.backward()
    assert value.item() == pytest.approx(conv_similarity(model[1].weight).item(), rel=1e-6)


def test_follows_the_module_not_the_tensor():
    model = Net()
    reg = ConvSimilarity(normalize=False, include='a')
    reg(model)
    model.a.weight = nn.Parameter(torch.ones(2, 1, 1, 1))
    assert reg(model).item() == 1


def test_bad_input():
    with pytest.raises(LeanError, match='has none'):
        ConvSimilarity()(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(LeanError, match='has none'):
        ConvSimilarity()(nn.Identity())
    with pytest.raises(LeanError, match='at least 0'):
        create_regularizer('conv_similarity', weight=-1.0)
    with pytest.raises(LeanError, match="'all' or 'adjacent'"):
        ConvSimilarity(pairs='some')
    with pytest.raises(LeanError, match='true or false'):
        ConvSimilarity(normalize='no')
    with pytest.raises(LeanError, match='divisible by groups=2'):
        conv_similarity(torch.ones(3, 1, 1, 1), groups=2)
    model = Net()
    with torch.no_grad():
        model.point.weight[0, 0] = float('nan')
    with pytest.raises(LeanError, match=r"'point' are not all finite"):
        ConvSimilarity()(model)


def test_peak_memory_is_below_twice_the_weights():
    model = timm.create_model('resnet18', num_classes=10)
    banks = find_filter_banks(model)
    total_bytes = sum(bank.weight.numel() * 4 for bank in banks)
    reg = ConvSimilarity()
    reg(model).backward()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        reg(model).backward()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == '[memory]']
    live = np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    # The gradients themselves, which any loss would allocate, are the first of the two.
    assert total_bytes <= live.max() < 2 * total_bytes


@pytest.mark.parametrize('keep_norm', [True, False])
def test_initialization_lowers_similarity(keep_norm):
    torch.manual_seed(0)
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trace = initialize_conv_similarity(model, steps=60, keep_norm=keep_norm)
    assert len(trace) == 61 and trace[-1] < 0.98 * trace[0]
    assert all(b < a for a, b in itertools.pairwise(trace[:20]))
    assert all(p.grad is None for p in model.parameters())
    for name, p in model.named_parameters():
        if name.endswith('bias'):
            assert torch.equal(p, before[name])
        elif keep_norm:
            assert p.norm().item() == pytest.approx(before[name].norm().item(), rel=1e-5)
    if not keep_norm:
        assert sum(p.norm() for p in model.parameters()) < sum(p.norm() for p in before.values())


def test_initialization_is_deterministic_and_stops_at_tol():
    def run(**kwargs):
        torch.manual_seed(3)
        model = Net()
        return initialize_conv_similarity(model, **kwargs), model.b.weight.detach()
    (first, w1), (second, w2) = run(steps=5), run(steps=5)
    assert first == second and torch.equal(w1, w2)
    assert len(run(steps=50, tol=0.5)[0]) == 2  # no step halves it
    assert len(run(steps=0)[0]) == 1
    assert len(run(steps=2, optimizer='sgd', lr=1e-6)[0]) == 3


def test_initialization_respects_frozen_and_excluded_layers():
    model = Net()
    model.a.weight.requires_grad_(False)
    a, b, wide = (m.weight.detach().clone() for m in (model.a, model.b, model.wide))
    initialize_conv_similarity(model, steps=2, exclude='b')
    assert torch.equal(model.a.weight, a) and torch.equal(model.b.weight, b)
    assert not torch.equal(model.wide.weight, wide)
    with pytest.raises(LeanError, match='frozen'):
        initialize_conv_similarity(model, steps=2, include='a')


@pytest.mark.parametrize('kwargs,match', [
    (dict(steps=-1), 'steps'), (dict(steps=1.5), 'steps'), (dict(steps=1, lr=0.0), 'learning rate'),
    (dict(steps=1, tol=-1.0), 'tol'), (dict(steps=1, optimizer='lion'), 'Unknown optimizer'),
    (dict(steps=60, optimizer='sgd', lr=1e9, keep_norm=False), 'diverged'),
])
def test_initialization_bad_input(kwargs, match):
    with pytest.raises(LeanError, match=match):
        initialize_conv_similarity(Net(), **kwargs)


def test_the_benchmark_compares_equals():
    """The two formulations the benchmark measures against compute the same sums."""
    path = Path(__file__).parents[1] / 'tools' / 'bench_regularizers.py'
    spec = importlib.util.spec_from_file_location('bench_regularizers', path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    for kernel in ((3, 3), (1, 1)):
        weight = torch.randn(6, 4, *kernel, dtype=torch.float64, requires_grad=True)
        assert tool.adjacent_by_grouped_conv(weight).item() == pytest.approx(
            conv_similarity(weight, pairs='adjacent').item())
        torch.testing.assert_close(tool.all_pairs_by_conv(weight), tool.all_pairs(weight))
