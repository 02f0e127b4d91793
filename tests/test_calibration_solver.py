"""The solver of calibration against least squares by numpy, filter by filter, and a generic optimizer."""
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from timm.layers import Conv2dSame

from timm_lean.calibration.layers import linear_map, patches
from timm_lean.calibration.moments import HeldOut, Moments
from timm_lean.calibration.shared import SharedLayer, alternate, orthonormalize, whitened_basis
from timm_lean.calibration.solver import block_jacobi, solve_change

RIDGE = 1e-3


def by_lstsq(x, lacking, free, ridge):
    """The change of one filter's weights: `[x; sqrt(ridge)] w = [e; 0]` on the free columns, by numpy."""
    columns = np.flatnonzero(free)
    penalty = np.diag(np.sqrt(ridge))[:, columns]
    a = np.concatenate([x[:, columns], penalty])
    change = np.zeros(len(free))
    change[columns] = np.linalg.lstsq(a, np.concatenate([lacking, np.zeros(len(ridge))]), rcond=None)[0]
    return change


@settings(max_examples=25, deadline=None)
@given(
    groups=st.integers(1, 3), ins=st.integers(1, 4), outs=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2), dilation=st.integers(1, 2), padding=st.integers(0, 2), bias=st.booleans(),
    dead=st.floats(0, 0.8), keep_samples=st.booleans(), seed=st.integers(0, 10_000))
def test_a_convolution_is_fitted_as_by_lstsq(
        groups, ins, outs, kernel, stride, dilation, padding, bias, dead, keep_samples, seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(groups * ins, groups * outs, kernel, stride, padding, dilation, groups, bias).double()
    with torch.no_grad():
        conv.weight *= (torch.rand(conv.weight.shape[:2]) >= dead)[:, :, None, None]
    x = torch.randn(4, groups * ins, 9, 8, dtype=torch.float64)
    target = torch.randn_like(conv(x))
    layer = linear_map(conv)
    samples = layer.inputs(x, None)
    ours = torch.einsum('ngd,god->ngo', samples, layer.weight)
    rows = target.flatten(2).transpose(1, 2).reshape(ours.shape)
    assert torch.allclose(ours.flatten(1), conv(x).flatten(2).transpose(1, 2).flatten(0, 1), atol=1e-12)

    moments, held = Moments(layer.groups, layer.filters, layer.size, keep_samples), HeldOut(groups, outs)
    for part in range(2):  # in pieces
        moments.add(samples[part::2], (rows - ours)[part::2])
        held.add(samples[part::2], (rows - ours)[part::2], rows[part::2])
    change = moments.solve(RIDGE, layer.free, layer.bias, layer.block, tolerance=1e-10)

    unfolded = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2).flatten(0, 1)
    unfolded = unfolded.view(len(unfolded), groups, -1)
    for g in range(groups):
        a = unfolded[:, g].numpy()
        ridge = np.full(a.shape[1], RIDGE * (a ** 2).sum(0).mean())
        if bias:
            a, ridge = np.concatenate([a, np.ones((len(a), 1))], 1), np.append(ridge, 0)
        for o in range(outs):
            live = (conv.weight[g * outs + o].detach() != 0).flatten().numpy()
            free = np.append(live, True) if bias else live
            e = (rows - ours)[:, g, o].detach().numpy()
            expected = by_lstsq(a, e, free, ridge)
            assert np.allclose(change[g, o].numpy(), expected, atol=1e-6 * max(np.abs(expected).max(), 1))
            assert (change[g, o].numpy()[~free] == 0).all()
            left = ((e - a @ expected) ** 2).sum()
            assert float(held.error_after(change)[g, o]) == pytest.approx(left, rel=1e-6, abs=1e-8)


def test_patches_of_a_convolution_that_pads_as_tensorflow_does():
    conv = Conv2dSame(3, 4, 3, stride=2)
    x = torch.randn(2, 3, 7, 10)
    expected = conv(x).flatten(2).transpose(1, 2)[:, [1, 5, 7]].flatten(0, 1)
    ours = patches(conv, x, torch.tensor([1, 5, 7])) @ conv.weight.flatten(1).T + conv.bias
    assert torch.allclose(ours, expected, atol=1e-5)


def test_large_equations_in_float32_are_solved_to_the_residual_of_float64():
    torch.manual_seed(0)
    x = torch.randn(3000, 1, 1100) @ torch.diag(torch.linspace(0.5, 2, 1100))
    lacking = torch.randn(3000, 1, 3)
    free = torch.rand(1, 3, 1100) > 0.5
    moments = Moments(1, 3, 1100)
    moments.add(x, lacking)
    change = moments.solve(RIDGE, free)
    penalty = RIDGE * moments.diagonal.mean()
    residual = ((moments.apply(change) + penalty * change - moments.cross) * free).norm(dim=2)
    assert bool((residual < 2e-3 * (moments.cross * free).norm(dim=2)).all())
    assert bool((change[~free] == 0).all())


def test_dead_kernels_of_neighbouring_pixels_take_fewer_steps_block_by_block():
    """Smooth images: the pixels of a kernel depend on each other, which the diagonal does not know."""
    torch.manual_seed(0)
    x = F.interpolate(torch.randn(20, 8, 4, 4, dtype=torch.float64), size=24, mode='bilinear')
    rows = F.unfold(x, 3).transpose(1, 2).flatten(0, 1)
    gram = (rows.T @ rows)[None]
    ridge = torch.full((1, 72), 1e-3 * float(gram[0].diagonal().mean()), dtype=torch.float64)
    free = (torch.rand(1, 4, 8, 1) > 0.5).expand(-1, -1, -1, 9).flatten(2)
    right = torch.randn(1, 4, 72, dtype=torch.float64) @ gram
    steps = []
    for scale in (None, block_jacobi(gram, ridge, 9, torch.float64)):
        calls = []

        def apply(w, calls=calls):
            calls.append(1)
            return w @ gram
        change = solve_change(apply, right, gram.diagonal(dim1=1, dim2=2), ridge, free, 1e-6, 1000, scale)
        exact = torch.zeros_like(change)
        for o in range(4):
            m = free[0, o]
            exact[0, o, m] = torch.linalg.solve((gram[0] + torch.diag(ridge[0]))[m][:, m], right[0, o, m])
        assert torch.allclose(change, exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))
        steps.append(len(calls))
    assert steps[1] < 0.5 * steps[0]


def shared_problem(layers=2, d=6, out=5, rank=3, unique=1, seed=0):
    torch.manual_seed(seed)
    problem, originals = [], []
    for _ in range(layers):
        x = torch.randn(50, d, dtype=torch.float64) @ torch.randn(d, d, dtype=torch.float64)
        gram = x.T @ x
        original = torch.randn(out, d, dtype=torch.float64)
        weight = 1 / float(((original @ gram) * original).sum())
        mix = torch.randn(out, unique + rank, dtype=torch.float64)
        problem.append(SharedLayer(gram, original @ gram, weight, mix, torch.randn(unique, d, dtype=torch.float64)))
        originals.append(original)
    return problem, originals, torch.randn(rank, d, dtype=torch.float64)


@pytest.mark.parametrize('unique', [0, 2])
def test_the_shared_fit_ends_no_worse_than_a_generic_optimizer(unique):
    problem, originals, _ = shared_problem(unique=unique)
    basis = alternate(problem, whitened_basis(problem, originals, 3), rounds=200)
    ours = sum(layer.loss(basis) for layer in problem)

    def unpack(v):
        parts = torch.as_tensor(v).split([3 * 6] + 2 * [5 * (3 + unique) + unique * 6])
        layers = [(p[:5 * (3 + unique)].view(5, -1), p[5 * (3 + unique):].view(unique, 6)) for p in parts[1:]]
        return parts[0].view(3, 6), layers

    def loss(v):
        v = torch.tensor(v, requires_grad=True)
        shared, layers = unpack(v)
        total = torch.zeros(())
        for (mix, own), layer in zip(layers, problem, strict=True):
            weight = mix @ torch.cat([own, shared])
            total = total + layer.weight * (weight * (weight @ layer.gram - 2 * layer.target)).sum()
        total.backward()
        return total.item(), v.grad.numpy()

    size = 18 + 2 * (5 * (3 + unique) + unique * 6)
    best = min(minimize(loss, np.random.default_rng(s).normal(size=size), jac=True, method='L-BFGS-B',
                        options={'maxiter': 5000, 'maxfun': 10000}).fun for s in range(4))
    assert ours <= best + 1e-4 * abs(best)


def test_equal_moments_give_the_svd():
    """With one second moment for all layers the whitened SVD is optimal (Eckart-Young) and alternating stays there."""
    problem, originals, _ = shared_problem(unique=0)
    lower = torch.linalg.cholesky(problem[0].gram)
    for layer, original in zip(problem, originals, strict=True):
        layer.gram, layer.target = problem[0].gram, original @ problem[0].gram
        layer.weight = 1 / float((original @ lower).norm() ** 2)
    basis = alternate(problem, whitened_basis(problem, originals, 3), rounds=3)
    lost = np.linalg.svd(torch.cat([o @ lower / (o @ lower).norm() for o in originals]).numpy())[1][3:]
    assert sum(layer.loss(basis) for layer in problem) + len(problem) == pytest.approx((lost ** 2).sum(), rel=1e-9)


def test_dead_entries_of_shared_filters_stay_zero():
    problem, _, basis = shared_problem()
    live = torch.rand(basis.shape) > 0.3
    problem[0].live_mix = torch.rand(problem[0].mix.shape) > 0.3
    problem[0].mix = problem[0].mix * problem[0].live_mix
    before = sum(layer.loss(basis * live) for layer in problem)
    fitted = alternate(problem, basis * live, 5, live)
    assert bool((fitted[~live] == 0).all()) and bool((problem[0].mix[~problem[0].live_mix] == 0).all())
    assert sum(layer.loss(fitted) for layer in problem) < before


def test_orthonormal_rows_and_the_same_layers():
    problem, _, basis = shared_problem()
    before = [layer.mix @ torch.cat([layer.unique, basis]) for layer in problem]
    basis = orthonormalize(problem, basis)
    assert torch.allclose(basis @ basis.T, torch.eye(3, dtype=torch.float64), atol=1e-12)
    for layer, weight in zip(problem, before, strict=True):
        assert torch.allclose(layer.mix @ torch.cat([layer.unique, basis]), weight, atol=1e-10)
