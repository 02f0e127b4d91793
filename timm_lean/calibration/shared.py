"""The basis that a group of layers shares, fitted to all of them at once.

Layer l with coefficients `C_l` and filters `F_l` (its unique ones above the shared ones, `B`) computes `C_l F_l x`.
Wanted is the least of `sum_l w_l (tr(W_l H_l W_l^T) - 2 tr(W_l G_l^T))` over `W_l = C_l F_l`, with the second moments
`H_l` of its inputs and `G_l` of what it should give with them (ridge included), `w_l` the inverse energy of outputs.
No single singular value decomposition solves this, as the `H_l` differ. One whitened by their mean is the start; then
coefficients, unique filters and basis are solved for in turn, each exactly while the others stand still.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from timm_lean.errors import LeanError

from .solver import Scaling, conjugate_gradients

__all__ = [
    'SharedLayer', 'alternate', 'orthonormalize', 'whitened', 'whitened_basis', 'whitened_unique']

_STEPS = 30  # each turn goes on where the last one ended
_FEW_STEPS = 10  # of wide layers, where a step costs as much as all else in a turn
_TOLERANCE = 1e-3
_EXACT_SIZE = 1024  # inputs up to which products of a step are float64; what a turn starts from always is


@dataclass
class SharedLayer:
    """One layer of a group.

    Attributes:
        gram: `H_l`, `[d, d]`, ridge included.
        target: `G_l`, `[out, d]`, ridge times the original's weights included.
        weight: `w_l`.
        mix: Coefficients, `[out, unique + shared]`; None where the filters are the outputs.
        unique: Filters of the layer alone, `[unique, d]`.
        live_mix: Mask of the coefficients that may change; all if None.
        live_unique: Mask of the unique filters' entries that may change; all if None.
    """
    gram: torch.Tensor
    target: torch.Tensor
    weight: float
    mix: torch.Tensor | None
    unique: torch.Tensor
    live_mix: torch.Tensor | None = None
    live_unique: torch.Tensor | None = None

    def fit_mix(self, basis: torch.Tensor) -> None:
        """The best coefficients for the filters as they are."""
        if self.mix is None:
            return
        filters = torch.cat([self.unique, basis])
        gram = filters @ self.gram @ filters.T
        right = self.target @ filters.T
        if self.live_mix is None:
            gram = gram + 1e-10 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            self.mix = torch.linalg.solve(gram, right.T).T
        else:
            rest = right - self.mix @ gram
            self.mix = self.mix + conjugate_gradients(
                lambda x: x @ gram, rest, _diagonal(gram.diagonal()), self.live_mix, max_steps=_STEPS)

    def fit_unique(self, basis: torch.Tensor) -> None:
        """The best unique filters for the coefficients and the basis as they are."""
        if self.mix is None or not len(self.unique):
            return
        own = self.mix[:, :len(self.unique)]
        square = own.T @ own
        rest = own.T @ (self.target - self.dense(basis) @ self.gram)
        self.unique = self.unique + conjugate_gradients(
            lambda x: square @ x @ self.gram, rest, _diagonal(square.diagonal()[:, None] * self.gram.diagonal()),
            self.live_unique, (-2, -1), _TOLERANCE, _STEPS)

    def dense(self, basis: torch.Tensor) -> torch.Tensor:
        """The layer's weights as one convolution, `[out, d]`."""
        filters = torch.cat([self.unique, basis])
        return filters if self.mix is None else self.mix @ filters

    def loss(self, basis: torch.Tensor) -> float:
        """The layer's part of what is minimized, up to a constant."""
        weight = self.dense(basis)
        return self.weight * float((weight * (weight @ self.gram - 2 * self.target)).sum())


def whitened(grams: Sequence[torch.Tensor], originals: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The filters of a group's layers, whitened by the mean of the layers' moments.

    Each layer counts alike: its moments and its filters are divided by the energy of its outputs.

    Args:
        grams: `H_l`, `[d, d]`.
        originals: Filters of the original, `[out, d]`.

    Returns:
        The filters times `L`, `[layers * out, d]`, and `L`, the lower triangle `[d, d]` with `L L^T` the mean moment.
    """
    mean = torch.zeros_like(grams[0])
    for gram, rows in zip(grams, originals, strict=True):
        least = 1e-6 * rows.square().sum() * gram.diagonal().abs().mean()  # of what is nearly constant, all is rounding
        mean += gram / float((rows @ gram * rows).sum().clamp_min(least).clamp_min(1e-30)) / len(grams)
    lower = _cholesky(mean)
    scaled = [rows @ lower for rows in originals]
    return torch.cat([rows / rows.norm().clamp_min(1e-30) for rows in scaled]), lower


def whitened_basis(layers: list[SharedLayer], originals: list[torch.Tensor], rank: int) -> torch.Tensor:
    """The start: the leading directions of the stacked filters, whitened by the mean of the layers' moments.

    Returns:
        `[rank, d]`
    """
    stacked, lower = whitened([layer.gram for layer in layers], originals)
    leading = torch.linalg.svd(stacked, full_matrices=False)[2][:rank]
    return torch.linalg.solve_triangular(lower, leading, upper=False, left=False)


def whitened_unique(layer: SharedLayer, original: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The leading directions of what a basis leaves of one layer, whitened by its own moments; `[unique, d]`."""
    lower = _cholesky(layer.gram)
    filters = torch.linalg.qr((basis @ lower).T)[0]
    rows = original @ lower
    leading = torch.linalg.svd(rows - rows @ filters @ filters.T, full_matrices=False)[2][:len(layer.unique)]
    return torch.linalg.solve_triangular(lower, leading, upper=False, left=False)


def alternate(
        layers: list[SharedLayer], basis: torch.Tensor, rounds: int, live: torch.Tensor | None = None,
) -> torch.Tensor:
    """Solve for coefficients, unique filters and the basis in turn.

    Args:
        layers: The group; their coefficients and unique filters are replaced.
        basis: The basis to start from, `[r, d]`.
        rounds: Turns.
        live: Mask of the basis's entries that may change; all if None.

    Returns:
        The basis.
    """
    lower = _sum_factor(layers) if live is None else None
    for _ in range(rounds):
        for layer in layers:
            layer.fit_mix(basis)
            layer.fit_unique(basis)
        basis = _fit_basis(layers, basis, live, lower)
    for layer in layers:
        layer.fit_mix(basis)
    return basis


def orthonormalize(layers: list[SharedLayer], basis: torch.Tensor) -> torch.Tensor:
    """The basis with orthonormal rows; the coefficients take the other factor, so that the layers stay the same."""
    rows, upper = torch.linalg.qr(basis.T)  # B = upper^T rows^T
    for layer in layers:
        assert layer.mix is not None
        layer.mix[:, len(layer.unique):] = layer.mix[:, len(layer.unique):] @ upper.T
    return rows.T


def _fit_basis(
        layers: list[SharedLayer], basis: torch.Tensor, live: torch.Tensor | None, lower: torch.Tensor | None,
) -> torch.Tensor:
    """The best basis for coefficients and unique filters as they are, by conjugate gradients from where it is.

    Args:
        layers: The group.
        basis: `[r, d]`.
        live: Mask of the entries that may change.
        lower: Cholesky factor of the sum of the layers' moments, for the preconditioner.
    """
    wide = basis.shape[1] > _EXACT_SIZE
    dtype = torch.float32 if wide else torch.float64
    rest, diagonal = torch.zeros_like(basis), torch.zeros_like(basis)
    parts, squares = [], torch.zeros(len(basis), len(basis), dtype=basis.dtype, device=basis.device)
    for layer in layers:
        lacking = layer.target - layer.dense(basis) @ layer.gram
        square = torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
        if layer.mix is not None:
            common = layer.mix[:, len(layer.unique):]
            lacking, square = common.T @ lacking, common.T @ common
        rest += layer.weight * lacking
        diagonal += layer.weight * square.diagonal()[:, None] * layer.gram.diagonal()
        squares += square / len(layers)
        parts.append(((layer.weight * square).to(dtype), layer.gram.to(dtype)))
    scale = _kronecker(squares, lower, dtype) if live is None and lower is not None else None
    change = conjugate_gradients(
        lambda x: sum((square @ x @ gram for square, gram in parts), torch.zeros_like(x)), rest.to(dtype),
        scale or _diagonal(diagonal.to(dtype)), live, (-2, -1), _TOLERANCE, _FEW_STEPS if wide else _STEPS)
    return basis + change


def _kronecker(squares: torch.Tensor, lower: torch.Tensor, dtype: torch.dtype) -> Scaling | None:
    """The preconditioner that would be exact if the layers had the same coefficients, or the same moments."""
    small = 1e-8 * squares.diagonal().mean()
    factor, failed = torch.linalg.cholesky_ex(squares + small * torch.eye(
        len(squares), dtype=squares.dtype, device=squares.device))
    if bool(failed):
        return None
    factor, lower = factor.to(dtype), lower.to(dtype)
    return lambda x: torch.cholesky_solve(torch.cholesky_solve(x, factor).mT, lower).mT


def _sum_factor(layers: list[SharedLayer]) -> torch.Tensor | None:
    """`L` with `L L^T` the sum of the weighted moments; None where rounding has made it indefinite."""
    total = torch.zeros_like(layers[0].gram)
    for layer in layers:
        total.add_(layer.gram, alpha=layer.weight)
    lower, failed = torch.linalg.cholesky_ex(total)
    return None if bool(failed) else lower


def _diagonal(diagonal: torch.Tensor) -> Scaling:
    inverse = diagonal.clamp_min(torch.finfo(diagonal.dtype).tiny).reciprocal()
    return lambda x: x * inverse


def _cholesky(gram: torch.Tensor) -> torch.Tensor:
    """The lower triangle `L` of `L L^T`: the matrix or, where rounding has made that indefinite, as near as it goes."""
    bound = gram.abs().sum(1).max().clamp_min(1e-30)  # of the eigenvalues (Gershgorin)
    for added in (0, 1e-9, 1e-7, 1e-5, 1e-3, 0.1, 2):
        lower, failed = torch.linalg.cholesky_ex(
            gram + added * bound * torch.eye(len(gram), dtype=gram.dtype, device=gram.device) if added else gram)
        if not bool(failed):
            return lower
    raise LeanError('A layer of a group that shares filters sees values that are not finite for these images.')
