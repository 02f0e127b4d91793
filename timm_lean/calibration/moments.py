"""Second moments of a layer's inputs with themselves and with what its outputs lack, and the fit that they give.

Products are those of the samples' own precision, piece by piece; sums over the pieces are float64, so that the error of
a moment is that of one piece, far below the ridge, however many images there are. Equations of up to 1,024 unknowns are
solved in float64. Larger ones are in float32, where a step is twice as fast (thirty times on most GPUs), and then once
more for the residual that is left, which is computed in float64.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .solver import solve_change

__all__ = ['Moments', 'all_reduce', 'is_distributed']

_EXACT_SIZE = 1024
_REFINEMENTS = 2
_MAX_STEPS = 50  # twenty or so are enough on the features of trained networks


class Moments:
    """Sums over samples of one layer.

    Args:
        groups: Groups of the layer.
        filters: Output channels of each group.
        size: Inputs that each filter sees.
        keep_samples: Keep the samples themselves, not `[size, size]` products: for fewer samples than inputs.

    Attributes:
        count: Samples.
        gram: `sum x x^T`, `[groups, size, size]`; None with samples kept.
        cross: `sum e x^T`, `[groups, filters, size]`.
        error: `sum e^2`, `[groups, filters]`.
        energy: `sum t^2` of the targets, `[groups, filters]`.
    """

    def __init__(
            self, groups: int, filters: int, size: int, keep_samples: bool = False,
            device: torch.device | None = None):
        dd: dict[str, Any] = {'device': device, 'dtype': torch.float64}
        self.count = 0
        self.gram = None if keep_samples else torch.zeros(groups, size, size, **dd)
        self.cross = torch.zeros(groups, filters, size, **dd)
        self.error = torch.zeros(groups, filters, **dd)
        self.energy = torch.zeros(groups, filters, **dd)
        self._samples: list[torch.Tensor] = []

    def add(self, inputs: torch.Tensor, lacking: torch.Tensor, targets: torch.Tensor) -> None:
        """Add samples.

        Args:
            inputs: `x`, `[n, groups, size]`.
            lacking: `e`, `[n, groups, filters]`.
            targets: What the outputs should be, `[n, groups, filters]`.
        """
        self.count += len(inputs)
        x, e = inputs.transpose(0, 1), lacking.permute(1, 2, 0)
        if self.gram is None:
            self._samples.append(x)
        else:
            self.gram += x.mT @ x
        self.cross += e @ x
        self.error += e.double().square().sum(2)
        self.energy += targets.double().square().sum(0)

    def reduce(self) -> None:
        """Sum over the processes of a distributed run."""
        tensors = [t for t in (self.gram, self.cross, self.error, self.energy) if t is not None]
        self.count = int(all_reduce([*tensors, torch.tensor([self.count], dtype=torch.float64)])[0])

    @property
    def diagonal(self) -> torch.Tensor:
        """Of the gram matrix, `[groups, size]`."""
        if self.gram is not None:
            return self.gram.diagonal(dim1=1, dim2=2)
        return self._joined().double().square().sum(1)

    def apply(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights `[groups, filters, size]` times the gram matrix, in the weights' precision."""
        return self._operator(weights.dtype)(weights)

    def error_after(self, change: torch.Tensor) -> torch.Tensor:
        """`sum (e - change x)^2`, `[groups, filters]`."""
        return self.error + (change * (self.apply(change) - 2 * self.cross)).sum(2)

    def solve(
            self, ridge: float, free: torch.Tensor | None = None, bias: bool = False, tolerance: float = 1e-5,
    ) -> torch.Tensor:
        """The change of weights that lowers the error most.

        Args:
            ridge: Penalty, relative to the mean diagonal of the gram matrix.
            free: Mask of the weights that may change, `[groups, filters, size]`; all if None.
            bias: The last input is the constant 1 of a bias, which is not penalized.
            tolerance: Norm of each filter's residual that is left, relative to that of its right side.

        Returns:
            `[groups, filters, size]` in float64, exactly 0 where not free.
        """
        diagonal = self.diagonal
        weights = diagonal[:, :-1] if bias else diagonal
        penalty = (ridge * weights.mean(1, keepdim=True)).expand_as(diagonal).clone()
        if bias:
            penalty[:, -1] = 0
        if free is None and self.gram is not None:
            lower, failed = torch.linalg.cholesky_ex(self.gram + torch.diag_embed(penalty))
            if not bool(failed.any()):
                return torch.cholesky_solve(self.cross.mT, lower).mT
        exact = diagonal.shape[1] <= _EXACT_SIZE
        dtype = torch.float64 if exact else torch.float32
        operator = self._operator(dtype)
        limits = (tolerance, 4 * _MAX_STEPS) if exact else (1e-3, _MAX_STEPS)
        change, right = torch.zeros_like(self.cross), self.cross
        for refinement in range(1 if exact else _REFINEMENTS):
            if refinement:
                right = self.cross - self.apply(change) - penalty[:, None] * change
            step = solve_change(operator, right.to(dtype), diagonal.to(dtype), penalty.to(dtype), free, *limits)
            change = change + step
        return change

    def _joined(self) -> torch.Tensor:
        if len(self._samples) > 1:
            self._samples = [torch.cat(self._samples, 1)]
        return self._samples[0]

    def _operator(self, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        if self.gram is not None:
            gram = self.gram.to(dtype)
            return lambda weights: weights @ gram
        samples = self._joined().to(dtype)
        return lambda weights: (weights @ samples.mT) @ samples


def is_distributed() -> bool:
    """Whether other processes have images too."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Sum tensors over the processes of a distributed run in place, all in one message; returns the last of them."""
    if is_distributed():
        flat = torch.cat([t.flatten().to(tensors[0].device) for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
    return tensors[-1]
