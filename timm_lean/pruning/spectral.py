"""Scores of convolution kernels by their determinant, eigenvalues, singular values and weights.

Paper: `Deep Convolutional Neural Networks Pruning by Eigenvalues`, Cugu & Akbas 2021
- https://arxiv.org/abs/2102.02804, section 3 (criteria and thresholds).

A kernel K is the `k x k` slice of one output and one input channel. With eigenvalues e and singular values s:

    det                   |det K|          below t^k
    det_gram              |det K^T K|      below t^(2k)
    min_eig               min |e|          below t
    min_eig_real          min |Re e|       below t
    spectral_radius       max |e|          below t
    spectral_radius_real  max |Re e|       below t
    spectral_norm         max s            below t
    weight                mean |w|         below t

and `trace`, |trace K|, and `random`, uniform in [0, 1), for comparison. A 1 x 1 kernel has the score |w| and the
threshold t under each of them.

2 x 2 and 3 x 3 kernels go through closed forms: the roots of the characteristic polynomial of K, and of K^T K. Its
roots are as sensitive as the eigenvalues themselves only for well separated ones, hence float64 throughout: rounding of
1e-16 moves a triple eigenvalue by 1e-5 of the norm, and LAPACK's by as much.
"""
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from timm_lean.errors import LeanError

__all__ = [
    'ALL_CRITERIA', 'CRITERIA', 'all_scores', 'below', 'check_criterion', 'degree', 'kernel_scores',
    'threshold_for']

CRITERIA = (
    'det', 'det_gram', 'min_eig', 'min_eig_real', 'spectral_radius', 'spectral_radius_real', 'spectral_norm', 'weight')
ALL_CRITERIA = (*CRITERIA, 'trace', 'random')
_ANY_SHAPE = ('spectral_norm', 'weight', 'random')
_EIGEN = ('min_eig', 'min_eig_real', 'spectral_radius', 'spectral_radius_real')

# Kernels per chunk. On the CPU a few vectors of float64 fit the second-level cache.
_CHUNK_CPU = 30_000
_CHUNK_GPU = 2 ** 20
_CHUNK_LAPACK = 2 ** 14

Scores = dict[str, torch.Tensor]


def check_criterion(criterion: str) -> str:
    """Return the criterion, or raise a LeanError that lists the known ones."""
    if criterion not in ALL_CRITERIA:
        raise LeanError(f'Unknown pruning criterion {criterion!r}. Known: {", ".join(ALL_CRITERIA)}.')
    return criterion


def kernel_scores(weight: torch.Tensor, criterion: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """Score every kernel of a convolution; a kernel with a low score matters little.

    Args:
        weight: Filters `[N, C / groups, kh, kw]` on any device.
        criterion: One of `ALL_CRITERIA`.
        generator: For `random`, a CPU generator; torch's own if None.

    Returns:
        Scores `[N, C / groups]` in float64 on the weight's device (on the CPU for devices without float64).

    Raises:
        LeanError: An unknown criterion, weights that are not finite, or kernels that are not square under a criterion
            that needs a square matrix.
    """
    check_criterion(criterion)
    _check_weight(weight)
    height, width = weight.shape[2:]
    if height != width and criterion not in _ANY_SHAPE:
        raise LeanError(f'The criterion {criterion!r} needs square kernels, got {height} x {width}. '
                        f'For these use one of {", ".join(_ANY_SHAPE)}.')
    return _scores(weight, (criterion,), generator)[criterion]


def all_scores(weight: torch.Tensor) -> Scores:
    """Score every kernel by all criteria (`random` excepted) in one pass.

    Args:
        weight: Filters `[N, C / groups, kh, kw]`.

    Returns:
        Criterion to scores `[N, C / groups]`; of kernels that are not square, `spectral_norm` and `weight` only.
    """
    _check_weight(weight)
    square = weight.shape[2] == weight.shape[3]
    return _scores(weight, tuple(c for c in ALL_CRITERIA if c != 'random' and (square or c in _ANY_SHAPE)))


def threshold_for(criterion: str, threshold: float, n: int) -> float:
    """The paper's threshold for scores of `n x n` kernels: t, t^n for `det`, t^(2n) for `det_gram`."""
    check_criterion(criterion)
    if not threshold >= 0:
        raise LeanError(f'A pruning threshold must be at least 0, got {threshold!r}.')
    return threshold ** degree(criterion, n)


def degree(criterion: str, n: int) -> int:
    """The degree of an `n x n` kernel's score in its weights: a kernel times 2 scores `2^degree` times as much."""
    return 1 if n == 1 else {'det': n, 'det_gram': 2 * n}.get(criterion, 1)


def below(scores: torch.Tensor, criterion: str, threshold: float, n: int) -> torch.Tensor:
    """Which scores of `n x n` kernels are below the paper's threshold, a boolean tensor of their shape.

    `det` and `det_gram` are decided by the same comparison, |det K| < t^n, so they agree to the last kernel.
    """
    if criterion == 'det_gram' and n > 1:
        scores, criterion = scores.sqrt(), 'det'
    limit = threshold_for(criterion, threshold, n)
    if limit > 1e-300 or threshold == 0:
        return scores < limit
    return scores.log() < n * math.log(threshold)  # t^n underflows even float64


def _check_weight(weight: torch.Tensor) -> None:
    if weight.ndim != 4 or not weight.is_floating_point():
        raise LeanError(f'Kernel scores need a real convolution weight [N, C, kh, kw], got {weight.dtype} '
                        f'{list(weight.shape)}.')


@torch.no_grad()
def _scores(weight: torch.Tensor, criteria: Sequence[str], generator: torch.Generator | None = None) -> Scores:
    out_shape = weight.shape[:2]
    if weight.device.type == 'mps':
        weight = weight.cpu()
    rows = weight.detach().flatten(2).flatten(0, 1)  # [kernels, kh * kw]
    if criteria == ('random',):
        return {'random': torch.rand(out_shape, generator=generator, dtype=torch.float64).to(weight.device)}
    height, width = weight.shape[2:]
    closed = (height, width) in _CLOSED
    chunk = (_CHUNK_GPU if weight.is_cuda else _CHUNK_CPU) if closed else _CHUNK_LAPACK
    function = _method(height, width, weight.dtype)
    results = {c: torch.empty(len(rows), dtype=torch.float64, device=weight.device) for c in criteria}

    @torch.no_grad()  # grad mode is one thread's
    def work(start: int) -> None:
        part = rows[start:start + chunk]
        for name, values in function(part, criteria).items():
            results[name][start:start + chunk] = values

    starts = range(0, len(rows), chunk)
    threads = torch.get_num_threads()
    if closed and weight.device.type == 'cpu' and threads > 1:
        # The cores share chunks. Within one, torch would share out some operations too, and wait after each of them.
        torch.set_num_threads(1)
        try:
            if len(starts) > 1:
                with ThreadPoolExecutor(min(threads, len(starts))) as pool:
                    list(pool.map(work, starts))
            elif starts:
                work(0)
        finally:
            torch.set_num_threads(threads)
    else:
        for start in starts:
            work(start)
    return {name: values.view(out_shape) for name, values in results.items()}


def _method(height: int, width: int, dtype: torch.dtype) -> Callable[[torch.Tensor, Sequence[str]], Scores]:
    """The function for kernels of this size, `([kernels, kh * kw], criteria) -> scores`."""
    closed = _CLOSED.get((height, width))
    if closed is None:
        return lambda rows, criteria: _scores_lapack(rows.double().view(-1, height, width), criteria)

    def planes(rows: torch.Tensor, criteria: Sequence[str]) -> Scores:
        k = [plane.double() for plane in rows.unbind(1)]  # one vector per entry of the matrix
        mean = _mean_abs(k)
        _check_finite(mean)
        if dtype != torch.float64:
            scores = closed(k, criteria)  # sixth powers of float32 are within the range of float64
        else:
            scale = mean.clamp(min=torch.finfo(torch.float64).tiny)
            scores = closed([plane / scale for plane in k], criteria)
            scores = {c: _scaled(v, scale, degree(c, height)) for c, v in scores.items()}
        return {c: mean if c == 'weight' else scores[c] for c in criteria}
    return planes


def _mean_abs(k: Sequence[torch.Tensor]) -> torch.Tensor:
    total = k[0].abs()
    for plane in k[1:]:
        total.add_(plane.abs())
    return total.div_(len(k))


def _check_finite(values: torch.Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise LeanError('Kernel scores: the weights are not all finite (NaN or infinity).')


def _scaled(values: torch.Tensor, scale: torch.Tensor, power: int) -> torch.Tensor:
    """`values * scale^power` without an overflow on the way."""
    for _ in range(power):
        values = values * scale
    return values


def _scores_1x1(k: Sequence[torch.Tensor], criteria: Sequence[str]) -> Scores:
    """|w| by every criterion."""
    return dict.fromkeys(criteria, k[0].abs())


def _scores_3x3(k: Sequence[torch.Tensor], criteria: Sequence[str]) -> Scores:
    """Closed forms for 3 x 3 kernels, nine vectors `[kernels]` in float64."""
    a, b, c, d, e, f, g, h, i = k
    result: Scores = {}
    if any(name in ('det', 'det_gram') for name in criteria):
        det = _det3(a, b, c, d, e, f, g, h, i)
        result['det'], result['det_gram'] = det.abs(), det * det
    if 'spectral_norm' in criteria:
        result['spectral_norm'] = _norm3(k)
    if 'trace' in criteria or any(name in _EIGEN for name in criteria):
        third = (a + e + i).div_(3)
        result['trace'] = (third * 3).abs_()
        if any(name in _EIGEN for name in criteria):
            _add_eigen(result, *_eig3(k, third))
    return result


def _det3(*k: torch.Tensor) -> torch.Tensor:
    a, b, c, d, e, f, g, h, i = k
    det = (e * i).addcmul_(f, h, value=-1).mul_(a)
    det.addcmul_(b, (f * g).addcmul_(d, i, value=-1))
    return det.addcmul_(c, (d * h).addcmul_(e, g, value=-1))


def _eig3(k: Sequence[torch.Tensor], third: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Eigenvalues as three real parts and the imaginary part of the last two (0 where all are real).

    Of B = K - trace/3 the characteristic polynomial is x^3 + P x - Q, P the sum of the principal minors, Q = det B.
    With h = Q/2, p = P/3 its discriminant has the sign of -D, D = h^2 + p^3.
    - D <= 0: three real roots 2r cos(t), r cos(t + 2pi/3), r cos(t - 2pi/3) with r^2 = -p, t = atan2(sqrt(-D), h) / 3.
    - D > 0: u = cbrt(h + sign(h) sqrt(D)), v = -p/u; roots u + v and -(u + v)/2 +- i sqrt(3)/2 (u - v).
    """
    _, b, c, d, _, f, g, h, _ = k
    a, e, i = k[0] - third, k[4] - third, k[8] - third
    p = (a * e).addcmul_(a, i).addcmul_(e, i).addcmul_(b, d, value=-1).addcmul_(c, g, value=-1)
    p.addcmul_(f, h, value=-1).div_(3)
    q = _det3(a, b, c, d, e, f, g, h, i).div_(2)
    disc = (p * p).mul_(p).addcmul_(q, q)
    root = disc.abs().sqrt_()

    # complex pair
    u = (q.abs() + root).pow_(1 / 3)
    v = p.neg().div_(u).nan_to_num_(0., 0., 0.)  # u = 0 only for a triple root at 0
    u, v = u.copysign_(q), v.copysign_(-p * q)
    # all real
    angle = torch.atan2(root, q).div_(3)
    radius = p.neg().clamp_(min=0).sqrt_()
    cosine, sine = angle.cos().mul_(radius), angle.sin_().mul_(radius).mul_(math.sqrt(3))

    real = disc <= 0
    first = torch.where(real, cosine * 2, u + v)
    middle = first * -0.5
    spread = sine.masked_fill_(~real, 0)
    imaginary = u.sub_(v).mul_(math.sqrt(3) / 2).masked_fill_(real, 0)
    middle.add_(third)
    return first.add_(third), middle + spread, middle - spread, imaginary


def _norm3(k: Sequence[torch.Tensor]) -> torch.Tensor:
    """Largest singular value: the root of the largest eigenvalue of the symmetric K^T K, by the trigonometric form."""
    a, b, c, d, e, f, g, h, i = k
    xx = (a * a).addcmul_(d, d).addcmul_(g, g)
    yy = (b * b).addcmul_(e, e).addcmul_(h, h)
    zz = (c * c).addcmul_(f, f).addcmul_(i, i)
    xy = (a * b).addcmul_(d, e).addcmul_(g, h)
    xz = (a * c).addcmul_(d, f).addcmul_(g, i)
    yz = (b * c).addcmul_(e, f).addcmul_(h, i)
    mean = (xx + yy).add_(zz).div_(3)
    xx.sub_(mean)
    yy.sub_(mean)
    zz.sub_(mean)
    off = (xy * xy).addcmul_(xz, xz).addcmul_(yz, yz)
    p = (xx * xx).addcmul_(yy, yy).addcmul_(zz, zz).add_(off, alpha=2).div_(6).sqrt_()
    det = (yy * zz).addcmul_(yz, yz, value=-1).mul_(xx)
    det.addcmul_(xy, (yz * xz).addcmul_(xy, zz, value=-1)).addcmul_(xz, (xy * yz).addcmul_(yy, xz, value=-1))
    cosine = det.div_(p * p * p).div_(2).nan_to_num_(0.).clamp_(-1, 1)  # p = 0: K^T K is a multiple of 1
    return cosine.acos_().div_(3).cos_().mul_(p).mul_(2).add_(mean).clamp_(min=0).sqrt_()


def _add_eigen(result: Scores, x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, im: torch.Tensor) -> None:
    square = im * im
    x, moduli = x.abs(), [(y * y).add_(square).sqrt_(), (z * z).add_(square).sqrt_()]
    y, z = y.abs(), z.abs()
    result['min_eig'] = torch.minimum(torch.minimum(x, moduli[0]), moduli[1])
    result['spectral_radius'] = torch.maximum(torch.maximum(x, moduli[0]), moduli[1])
    result['min_eig_real'] = torch.minimum(torch.minimum(x, y), z)
    result['spectral_radius_real'] = torch.maximum(torch.maximum(x, y), z)


def _scores_2x2(k: Sequence[torch.Tensor], criteria: Sequence[str]) -> Scores:
    """Closed forms for 2 x 2 kernels, four vectors `[kernels]` in float64."""
    a, b, c, d = k
    det, half = a * d - b * c, (a + d) / 2
    disc = ((a - d) / 2).square() + b * c
    root = disc.abs().sqrt()
    spread, im = torch.where(disc < 0, 0., root), torch.where(disc < 0, root, 0.)
    moduli = torch.hypot(half + spread, im), torch.hypot(half - spread, im)
    reals = (half + spread).abs(), (half - spread).abs()
    return {
        'det': det.abs(), 'det_gram': det * det,
        'min_eig': torch.minimum(*moduli), 'spectral_radius': torch.maximum(*moduli),
        'min_eig_real': torch.minimum(*reals), 'spectral_radius_real': torch.maximum(*reals),
        'spectral_norm': (torch.hypot(a + d, b - c) + torch.hypot(a - d, b + c)) / 2,
        'trace': (a + d).abs(),
    }


def _scores_lapack(k: torch.Tensor, criteria: Sequence[str]) -> Scores:
    """Any other size, `[kernels, kh, kw]` in float64, by torch.linalg."""
    _check_finite(k)
    result: Scores = {}
    if 'weight' in criteria:
        result['weight'] = k.abs().mean((1, 2))
    if 'spectral_norm' in criteria:
        result['spectral_norm'] = torch.linalg.svdvals(k)[:, 0]
    if 'det' in criteria or 'det_gram' in criteria:
        det = torch.linalg.det(k)
        result['det'], result['det_gram'] = det.abs(), det * det
    if 'trace' in criteria:
        result['trace'] = k.diagonal(dim1=1, dim2=2).sum(1).abs()
    if any(name in _EIGEN for name in criteria):
        eigenvalues = torch.linalg.eigvals(k)
        moduli, reals = eigenvalues.abs(), eigenvalues.real.abs()
        result['min_eig'], result['spectral_radius'] = moduli.amin(1), moduli.amax(1)
        result['min_eig_real'], result['spectral_radius_real'] = reals.amin(1), reals.amax(1)
    return {name: result[name] for name in criteria}


_CLOSED: dict[tuple[int, int], Callable[[Sequence[torch.Tensor], Sequence[str]], Scores]] = {
    (1, 1): _scores_1x1, (2, 2): _scores_2x2, (3, 3): _scores_3x3}
