"""Kernel scores against numpy and LAPACK, on random and on adversarial matrices."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from timm_lean import LeanError
from timm_lean.pruning.spectral import ALL_CRITERIA, CRITERIA, all_scores, below, kernel_scores, threshold_for


def reference(kernel: np.ndarray) -> dict[str, float]:
    """The definitions, by numpy in float64."""
    k = kernel.astype(np.float64)
    eigenvalues = np.linalg.eigvals(k)
    det = np.linalg.det(k)
    return {
        'det': abs(det), 'det_gram': abs(np.linalg.det(k.T @ k)),
        'min_eig': np.abs(eigenvalues).min(), 'min_eig_real': np.abs(eigenvalues.real).min(),
        'spectral_radius': np.abs(eigenvalues).max(), 'spectral_radius_real': np.abs(eigenvalues.real).max(),
        'spectral_norm': np.linalg.norm(k, 2), 'weight': np.abs(k).mean(), 'trace': abs(np.trace(k)),
    }


def check(kernel: np.ndarray, tolerance: float, device: str | torch.device = 'cpu') -> None:
    """Every score within `tolerance` times the norm (to the power of the score's degree) of the reference."""
    n = len(kernel)
    expected = reference(kernel)
    norm = expected['spectral_norm']
    scores = all_scores(torch.from_numpy(kernel)[None, None].to(device))
    assert set(scores) == set(ALL_CRITERIA) - {'random'}
    for name, value in expected.items():
        degree = {'det': n, 'det_gram': 2 * n}.get(name, 1)
        assert abs(scores[name].item() - value) <= tolerance * norm ** degree + 1e-300, (name, kernel.tolist())


@pytest.mark.parametrize('n', [2, 3, 4, 5, 7])
def test_random_kernels(n, device):
    kernels = torch.randn(300, 1, n, n)
    scores = {name: values.cpu() for name, values in all_scores(kernels.to(device)).items()}
    for i, kernel in enumerate(kernels[:, 0].numpy()):
        expected = reference(kernel)
        for name, value in expected.items():
            degree = {'det': n, 'det_gram': 2 * n}.get(name, 1)
            assert abs(scores[name][i, 0].item() - value) <= 1e-9 * expected['spectral_norm'] ** degree, name


def conjugated(core: list[list[float]], seed: int) -> np.ndarray:
    """Q core Q^T with a random orthogonal Q, in float32: the same eigenvalues, no zeros to see."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(core), len(core))))
    return (q @ np.array(core, dtype=float) @ q.T).astype(np.float32)


C, S = math.cos(1.0), math.sin(1.0)
ADVERSARIAL = {
    'zero': [[0, 0, 0], [0, 0, 0], [0, 0, 0]],
    'identity': [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    'minus identity': [[-1, 0, 0], [0, -1, 0], [0, 0, -1]],
    'nilpotent': [[0, 1, 2], [0, 0, 3], [0, 0, 0]],
    'nilpotent of order 2': [[0, 0, 1], [0, 0, 0], [0, 0, 0]],
    'Jordan block': [[2, 1, 0], [0, 2, 1], [0, 0, 2]],
    'half a Jordan block': [[2, 1, 0], [0, 2, 0], [0, 0, -1]],
    'rotation': [[C, -S, 0], [S, C, 0], [0, 0, 1]],
    'right angle': [[0, -1, 0], [1, 0, 0], [0, 0, 1]],
    'rotation and 0': [[C, -S, 0], [S, C, 0], [0, 0, 0]],
    'cyclic': [[0, 1, 0], [0, 0, 1], [1, 0, 0]],
    'rank one': [[1, 2, 3], [2, 4, 6], [3, 6, 9]],
    'rank one, no trace': [[1, 1, 0], [-1, -1, 0], [0, 0, 0]],
    'rank two': [[1, 2, 3], [4, 5, 6], [7, 8, 9]],
    'symmetric double': [[3, 0, 0], [0, 3, 0], [0, 0, -1]],
    'antisymmetric': [[0, 1, -2], [-1, 0, 3], [2, -3, 0]],
    'far apart': [[1, 0, 0], [0, 1e-3, 0], [0, 0, 1e-6]],
    'nearly defective': [[1, 1, 0], [1e-7, 1, 0], [0, 0, 1]],
    'hidden small': [[1e-4, 1, 1], [0, 2e-4, 1], [0, 0, 3e-4]],
    'Sobel': [[1, 0, -1], [2, 0, -2], [1, 0, -1]],
    'Laplace': [[0, 1, 0], [1, -4, 1], [0, 1, 0]],
    'one entry': [[0, 0, 0], [0, 5, 0], [0, 0, 0]],
    'ones': [[1, 1, 1], [1, 1, 1], [1, 1, 1]],
}


@pytest.mark.parametrize('scale', [1, 1e-4, 1e-20, 1e-30, 1e30])
@pytest.mark.parametrize('name', ADVERSARIAL)
def test_adversarial_kernels(name, scale, device):
    check((np.array(ADVERSARIAL[name]) * scale).astype(np.float32), 1e-4, device)
    for seed in range(3):
        check((conjugated(ADVERSARIAL[name], seed) * scale).astype(np.float32), 1e-4, device)


@pytest.mark.parametrize('core', [
    [[0, 0], [0, 0]], [[0, 1], [0, 0]], [[1, 1], [0, 1]], [[C, -S], [S, C]], [[1, 2], [2, 4]], [[3, 0], [0, -3]],
    [[1, 0], [0, 1e-5]], [[1, 1], [1e-9, 1]]])
@pytest.mark.parametrize('scale', [1, 1e-20, 1e20])
def test_adversarial_2x2(core, scale):
    check((np.array(core) * scale).astype(np.float32), 1e-4)
    check((conjugated(core, 0) * scale).astype(np.float32), 1e-4)


FLOATS = st.floats(-1e3, 1e3, width=32) | st.sampled_from(
    [float(np.float32(x)) for x in (0., 1., -1., 1e-20, 3e-39, 2.)])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from([2, 3]).flatmap(lambda n: arrays(np.float32, (n, n), elements=FLOATS)))
def test_any_kernel(kernel):
    check(kernel, 1e-4)
    eigenvalues = np.linalg.eigvals(kernel.astype(np.float64))
    gaps = np.abs(eigenvalues[:, None] - eigenvalues[None]) + np.eye(len(kernel)) * 1e30
    if gaps.min() > 0.03 * np.linalg.norm(kernel.astype(np.float64), 2):
        check(kernel, 1e-5)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(arrays(np.float64, (3, 3), elements=st.floats(-1, 1) | st.sampled_from([0., 1.])), st.integers(-300, 300))
def test_float64_of_any_size(kernel, exponent):
    """Scores are homogeneous, so a power of two in front must come out as that; det may leave the range."""
    kernel = np.where(np.abs(kernel) < 1e-100, 0., kernel)
    scale = 2. ** exponent
    scores, scaled = (all_scores(torch.from_numpy(k)[None, None]) for k in (kernel, kernel * scale))
    for name, value in scores.items():
        if name not in ('det', 'det_gram'):
            assert scaled[name].item() == pytest.approx(value.item() * scale, rel=1e-12), name


def test_the_sum_of_scales_does_not_matter_to_chunks(monkeypatch):
    weight = torch.randn(20, 7, 3, 3)
    whole = all_scores(weight)
    monkeypatch.setattr('timm_lean.pruning.spectral._CHUNK_CPU', 13)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, values in all_scores(weight).items():
            torch.testing.assert_close(values, whole[name], rtol=1e-12, atol=1e-12)
    torch.set_num_threads(1)


@pytest.mark.parametrize('criterion', CRITERIA)
def test_one_criterion_equals_all(criterion):
    for n in (2, 3, 5):
        weight = torch.randn(4, 6, n, n)
        torch.testing.assert_close(kernel_scores(weight, criterion), all_scores(weight)[criterion], rtol=0, atol=0)


def test_det_and_det_gram_decide_alike():
    kernels = torch.randn(20_000, 1, 3, 3) * torch.logspace(-6, -2, 20_000)[:, None, None, None]
    scores = all_scores(kernels)
    for t in (1e-4, 1e-3, 3e-5):
        det, gram = below(scores['det'], 'det', t, 3), below(scores['det_gram'], 'det_gram', t, 3)
        assert torch.equal(det, gram)
        assert 0 < det.sum() < len(kernels)


@pytest.mark.parametrize('criterion, n, expected', [
    ('det', 3, 1e-12), ('det_gram', 3, 1e-24), ('det', 2, 1e-8), ('det_gram', 5, 1e-40), ('min_eig', 3, 1e-4),
    ('spectral_radius_real', 7, 1e-4), ('spectral_norm', 3, 1e-4), ('weight', 3, 1e-4), ('det', 1, 1e-4),
    ('det_gram', 1, 1e-4), ('trace', 3, 1e-4)])
def test_thresholds_of_the_paper(criterion, n, expected):
    assert threshold_for(criterion, 1e-4, n) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('criterion', ALL_CRITERIA[:-1])
@pytest.mark.parametrize('n', [1, 2, 3, 5])
def test_a_kernel_times_a_scale_crosses_the_threshold_at_that_scale(criterion, n):
    """`a I` has every eigenvalue a and norm a, its mean and trace known; the float32 values t^n would underflow."""
    factor = {'weight': n / n ** 2, 'trace': n}.get(criterion, 1) if n > 1 else 1
    for t in (1e-4, 1e-12):
        for a, expected in ((0.99 * t / factor, True), (1.01 * t / factor, False)):
            scores = kernel_scores((torch.eye(n) * a)[None, None], criterion)
            assert below(scores, criterion, t, n).item() is expected


def test_thresholds_that_underflow_float64():
    tiny = torch.eye(7, dtype=torch.float64)[None, None] * 1e-40
    assert threshold_for('det', 1e-60, 7) == 0
    assert not below(kernel_scores(tiny, 'det'), 'det', 1e-60, 7)
    assert below(kernel_scores(tiny * 0, 'det'), 'det', 1e-60, 7)
    assert not below(kernel_scores(tiny * 0, 'det'), 'det', 0, 7), 'nothing is below zero'


def test_1x1_kernels_score_by_their_magnitude():
    weight = torch.randn(3, 4, 1, 1)
    for values in all_scores(weight).values():
        assert torch.equal(values, weight[:, :, 0, 0].double().abs())


def test_kernels_that_are_not_square():
    weight = torch.randn(3, 4, 1, 7)
    scores = all_scores(weight)
    assert set(scores) == {'spectral_norm', 'weight'}
    torch.testing.assert_close(scores['spectral_norm'], weight.double().norm(dim=(2, 3)))
    for criterion in set(ALL_CRITERIA) - {'spectral_norm', 'weight', 'random'}:
        with pytest.raises(LeanError, match=r'needs square kernels, got 1 x 7.*spectral_norm'):
            kernel_scores(weight, criterion)


def test_grouped_weights_and_layouts():
    conv = torch.nn.Conv2d(8, 12, 3, groups=4)
    scores = kernel_scores(conv.weight, 'det')
    assert scores.shape == (12, 2)
    assert not scores.requires_grad
    swapped = conv.weight.detach().to(memory_format=torch.channels_last)
    assert torch.equal(kernel_scores(swapped, 'det'), scores)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_scored_as_stored(dtype):
    weight = torch.randn(5, 5, 3, 3).to(dtype)
    for name, values in all_scores(weight).items():
        torch.testing.assert_close(values, all_scores(weight.double())[name], rtol=1e-9, atol=1e-12)


def test_random_follows_its_generator():
    weight = torch.randn(5, 6, 3, 3)
    draws = [kernel_scores(weight, 'random', torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].shape == (5, 6)


@pytest.mark.parametrize('call, words', [
    (lambda: kernel_scores(torch.randn(1, 1, 3, 3), 'eigen'), "Unknown pruning criterion 'eigen'.*det_gram"),
    (lambda: kernel_scores(torch.randn(3, 3), 'det'), r'\[N, C, kh, kw\]'),
    (lambda: all_scores(torch.ones(1, 1, 3, 3, dtype=torch.int64)), 'int64'),
    (lambda: all_scores(torch.full((1, 1, 3, 3), math.nan)), 'not all finite'),
    (lambda: all_scores(torch.full((1, 1, 3, 3), math.inf)), 'not all finite'),
    (lambda: threshold_for('det', -1e-4, 3), 'at least 0, got -0.0001'),
    (lambda: threshold_for('det', math.nan, 3), 'at least 0, got nan'),
    (lambda: threshold_for('x', 1, 3), 'Unknown pruning criterion'),
])
def test_bad_input(call, words):
    with pytest.raises(LeanError, match=words):
        call()


@pytest.mark.parametrize('criterion', CRITERIA)
def test_1x1_kernels_of_float64_score_their_absolute_value(criterion):
    weight = torch.randn(5, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 10
    torch.testing.assert_close(kernel_scores(weight, criterion), weight[:, :, 0, 0].abs())
