"""Least squares on second moments, all filters of a layer at once.

Wanted is the change `D` of a layer's weights, `[groups, filters, d]`, that minimizes

    sum ||D x - e||^2 + ridge ||D||^2   over the free entries of D,

`x` the layer's inputs `[d]`, `e` what its outputs lack. With `H = sum x x^T` and `R = sum e x^T` its normal equations
are `(D (H + ridge)) * M = R * M` for the mask `M` of free entries, which conjugate gradients solve for all filters in
one matrix product a step. Working on the change keeps rounding small where little is to be changed, and weights in
directions that the images do not excite stay as they are.
"""
from collections.abc import Callable

import torch

__all__ = ['Scaling', 'block_jacobi', 'conjugate_gradients', 'solve_change']

Scaling = Callable[[torch.Tensor], torch.Tensor]


def solve_change(
        apply: Callable[[torch.Tensor], torch.Tensor],
        right: torch.Tensor,
        diagonal: torch.Tensor,
        ridge: torch.Tensor,
        free: torch.Tensor | None = None,
        tolerance: float = 1e-5,
        max_steps: int = 300,
        scale: Scaling | None = None,
) -> torch.Tensor:
    """The change of weights that lowers the output error most.

    Args:
        apply: Multiplies by `H` from the right, `[g, filters, d]` to the same.
        right: `R`, `[g, filters, d]`.
        diagonal: Diagonal of `H`, `[g, d]`.
        ridge: Penalty on each input, `[g, d]`.
        free: Mask of the entries that may change, `[g, filters, d]`; all if None.
        tolerance: Norm of each filter's residual, relative to that of its right side.
        max_steps: Steps at most.
        scale: A better preconditioner than the diagonal.

    Returns:
        `D`, exactly 0 where not free.
    """
    ridge = ridge[:, None]
    # an input that is 0 everywhere has no equation: without a penalty it would divide by 0
    inverse = (diagonal[:, None] + ridge).clamp_min(torch.finfo(right.dtype).tiny).reciprocal()
    return conjugate_gradients(
        lambda x: apply(x) + ridge * x, right, scale or (lambda x: x * inverse), free, (-1,), tolerance, max_steps)


def block_jacobi(gram: torch.Tensor, ridge: torch.Tensor, block: int, dtype: torch.dtype) -> Scaling | None:
    """A preconditioner that solves for each kernel by itself: neighbouring pixels depend on each other most.

    Args:
        gram: `H`, `[g, d, d]`.
        ridge: Penalty on each input, `[g, d]`.
        block: Inputs of a kernel; what is left of `d` (a bias) is scaled by the diagonal.
        dtype: Of what will be scaled.

    Returns:
        None where the blocks have no inverse.
    """
    count = gram.shape[1] // block
    whole = gram[:, :count * block, :count * block].unflatten(2, (count, block)).unflatten(1, (count, block))
    blocks = whole.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2) + torch.diag_embed(
        ridge[:, :count * block].unflatten(1, (count, block)))
    lower, failed = torch.linalg.cholesky_ex(blocks)
    if bool(failed.any()):
        return None
    inverse = torch.cholesky_inverse(lower).to(dtype)  # [g, count, block, block]
    rest = (gram.diagonal(dim1=1, dim2=2) + ridge)[:, None, count * block:].clamp_min(1e-30).reciprocal().to(dtype)

    def scale(x: torch.Tensor) -> torch.Tensor:
        kernels = x[..., :count * block].unflatten(-1, (count, block)).transpose(1, 2) @ inverse
        return torch.cat([kernels.transpose(1, 2).flatten(2), x[..., count * block:] * rest], -1)
    return scale


def conjugate_gradients(
        apply: Callable[[torch.Tensor], torch.Tensor],
        right: torch.Tensor,
        scale: Scaling,
        free: torch.Tensor | None = None,
        dims: tuple[int, ...] = (-1,),
        tolerance: float = 1e-5,
        max_steps: int = 300,
) -> torch.Tensor:
    """Solve symmetric positive equations restricted to a mask.

    Args:
        apply: The symmetric operator.
        right: Right side.
        scale: The preconditioner, about the operator's inverse; symmetric, and free unknowns do not mix with others.
        free: Mask of the unknowns; the others are 0.
        dims: Dimensions of one system; the rest are systems of their own, each with its own steps.
        tolerance: Norm of each system's residual, relative to that of its right side.
        max_steps: Steps at most.
    """
    def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * b).sum(dims, keepdim=True)

    tiny = torch.finfo(right.dtype).tiny
    rest = right if free is None else right * free
    solution = torch.zeros_like(rest)
    goal = tolerance ** 2 * dot(rest, rest)
    scaled = scale(rest)
    direction, energy = scaled, dot(rest, scaled)
    for _ in range(max_steps):
        image = apply(direction)
        if free is not None:
            image = image * free
        step = energy / dot(direction, image).clamp_min(tiny)
        solution = solution + step * direction
        rest = rest - step * image
        if bool((dot(rest, rest) <= goal).all()):
            break
        scaled = scale(rest)
        before, energy = energy, dot(rest, scaled)
        direction = scaled + energy / before.clamp_min(tiny) * direction
    return solution
