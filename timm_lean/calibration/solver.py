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

__all__ = ['conjugate_gradients', 'solve_change']


def solve_change(
        apply: Callable[[torch.Tensor], torch.Tensor],
        right: torch.Tensor,
        diagonal: torch.Tensor,
        ridge: torch.Tensor,
        free: torch.Tensor | None = None,
        tolerance: float = 1e-5,
        max_steps: int = 300,
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

    Returns:
        `D`, exactly 0 where not free.
    """
    ridge = ridge[:, None]
    # an input that is 0 everywhere has no equation: without a penalty it would divide by 0
    preconditioner = (diagonal[:, None] + ridge).clamp_min(torch.finfo(right.dtype).tiny)
    return conjugate_gradients(
        lambda x: apply(x) + ridge * x, right, preconditioner, free, (-1,), tolerance, max_steps)


def conjugate_gradients(
        apply: Callable[[torch.Tensor], torch.Tensor],
        right: torch.Tensor,
        diagonal: torch.Tensor,
        free: torch.Tensor | None = None,
        dims: tuple[int, ...] = (-1,),
        tolerance: float = 1e-5,
        max_steps: int = 300,
) -> torch.Tensor:
    """Solve symmetric positive equations restricted to a mask, with the diagonal as preconditioner.

    Args:
        apply: The symmetric operator.
        right: Right side.
        diagonal: Diagonal of the operator, broadcast to the right side.
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
    scaled = rest / diagonal
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
        scaled = rest / diagonal
        before, energy = energy, dot(rest, scaled)
        direction = scaled + energy / before.clamp_min(tiny) * direction
    return solution
