"""Sums over a layer's samples, and the fit that they give.

Of the samples that a layer is fitted to only second moments are kept, of inputs with themselves and with what outputs
lack. Products are those of the samples' own precision, over as many samples as there are inputs; sums over these pieces
are float64, so that the error of a moment is that of one piece, far below the ridge, however many images there are.
Equations of up to 512 unknowns are solved in float64, as are those that a Cholesky factor solves for all filters at
once. Larger ones with dead kernels are in float32, where a step is twice as fast (thirty times on most GPUs), and once
more for the residual, computed in float64, where that is still large.

Of held-out samples nothing is solved for, only errors are wanted: the samples themselves are kept, which are fewer than
the products would be.
"""
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from .solver import block_jacobi, solve_change

__all__ = ['HeldOut', 'Moments', 'all_reduce', 'is_distributed']

_EXACT_SIZE = 512
_REFINEMENTS = 2
_MAX_STEPS = 40
_GOOD_ENOUGH = 1e-2  # relative residual of large equations, far less in the error: that goes with its square
_PIECE = 4096  # samples of one product at least


class Moments:
    """Sums over samples of one layer.

    Args:
        groups: Groups of the layer.
        filters: Output channels of each group.
        size: Inputs that each filter sees.
        keep_samples: Keep the samples themselves, not `[size, size]` products: for fewer samples than inputs.

    Attributes:
        count: Samples.
    """

    def __init__(
            self, groups: int, filters: int, size: int, keep_samples: bool = False,
            device: torch.device | None = None):
        dd: dict[str, Any] = {'device': device, 'dtype': torch.float64}
        self.count = 0
        self._size = size
        self._gram = None if keep_samples else torch.zeros(groups, size, size, **dd)
        self._cross = torch.zeros(groups, filters, size, **dd)
        self._samples: list[tuple[torch.Tensor, torch.Tensor]] = []  # not summed up yet, or kept

    def add(self, inputs: torch.Tensor, lacking: torch.Tensor) -> None:
        """Add samples.

        Args:
            inputs: `x`, `[n, groups, size]`.
            lacking: `e`, what the outputs lack, `[n, groups, filters]`.
        """
        self.count += len(inputs)
        self._samples.append((inputs.transpose(0, 1), lacking.permute(1, 2, 0)))
        if self._gram is not None and sum(x.shape[1] for x, _ in self._samples) >= max(self._size, _PIECE):
            self._sum_up()

    def reduce(self, *others: torch.Tensor) -> None:
        """Sum over the processes of a distributed run, and other tensors with it, in one message."""
        self._sum_up()
        tensors = [t for t in (self._gram, self._cross, *others) if t is not None]
        self.count = int(all_reduce([*tensors, torch.tensor([self.count], dtype=torch.float64)])[0])

    @property
    def gram(self) -> torch.Tensor | None:
        """`sum x x^T`, `[groups, size, size]`; None with samples kept."""
        self._sum_up()
        return self._gram

    @property
    def cross(self) -> torch.Tensor:
        """`sum e x^T`, `[groups, filters, size]`."""
        self._sum_up()
        return self._cross

    @property
    def diagonal(self) -> torch.Tensor:
        """Of the gram matrix, `[groups, size]`."""
        if self.gram is not None:
            return self.gram.diagonal(dim1=1, dim2=2)
        return self._joined()[0].double().square().sum(1)

    def apply(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights `[groups, filters, size]` times the gram matrix, in the weights' precision."""
        return self._operator(weights.dtype)(weights)

    def solve(
            self, ridge: float, free: torch.Tensor | None = None, bias: bool = False, block: int = 1,
            tolerance: float = 1e-4,
    ) -> torch.Tensor:
        """The change of weights that lowers the error most.

        Args:
            ridge: Penalty, relative to the mean diagonal of the gram matrix.
            free: Mask of the weights that may change, `[groups, filters, size]`; all if None.
            bias: The last input is the constant 1 of a bias, which is not penalized.
            block: So many neighbouring inputs, a kernel's, are free together.
            tolerance: Norm of each filter's residual that is left, relative to that of its right side.

        Returns:
            `[groups, filters, size]` in float64, exactly 0 where not free.
        """
        diagonal = self.diagonal
        weights = diagonal[:, :-1] if bias else diagonal
        penalty = (ridge * weights.mean(1, keepdim=True)).expand_as(diagonal).clone()
        if bias:
            penalty[:, -1] = 0
        if free is None:
            change = self._solve_at_once(penalty) if self._gram is not None else self._solve_by_samples(
                penalty[:, :1], bias)
            if change is not None:
                return change
        exact = diagonal.shape[1] <= _EXACT_SIZE
        dtype = torch.float64 if exact else torch.float32
        operator = self._operator(dtype)
        scale = None if self.gram is None or block == 1 else block_jacobi(self.gram, penalty, block, dtype)
        limits = (tolerance, 4 * _MAX_STEPS) if exact else (1e-3, _MAX_STEPS)
        change, right = torch.zeros_like(self.cross), self.cross
        for refinement in range(1 if exact else _REFINEMENTS):
            if refinement:
                right = self.cross - self.apply(change) - penalty[:, None] * change
                if free is not None:
                    right = right * free
                if bool((right.norm(dim=2) <= _GOOD_ENOUGH * self.cross.norm(dim=2)).all()):
                    break
            step = solve_change(operator, right.to(dtype), diagonal.to(dtype), penalty.to(dtype), free, *limits, scale)
            change = change + step
        return change

    def _solve_at_once(self, penalty: torch.Tensor) -> torch.Tensor | None:
        """All filters by one Cholesky factor; None where rounding has made the matrix indefinite."""
        matrix = self._gram.clone()  # type: ignore[union-attr]
        matrix.diagonal(dim1=1, dim2=2).add_(penalty)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        return None if bool(failed.any()) else torch.cholesky_solve(self.cross.mT, lower).mT

    def _solve_by_samples(self, penalty: torch.Tensor, bias: bool) -> torch.Tensor | None:
        """Fewer samples than inputs: `E (X X^T + penalty)^-1 X`, of deviations from the means if there is a bias."""
        x, e = (t.double() for t in self._joined())
        if bias:
            x, middle = x[..., :-1] - x[..., :-1].mean(1, keepdim=True), x[..., :-1].mean(1, keepdim=True)
            e, level = e - e.mean(2, keepdim=True), e.mean(2, keepdim=True)
        matrix = x @ x.mT
        matrix.diagonal(dim1=1, dim2=2).add_(penalty)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if bool(failed.any()):
            return None
        change = torch.cholesky_solve(e.mT, lower).mT @ x
        return change if not bias else torch.cat([change, level - change @ middle.mT], 2)

    def _sum_up(self) -> None:
        if self._samples:
            x, e = self._joined()
            if self._gram is None:
                self._cross.copy_(e @ x)
            else:
                self._gram += x.mT @ x
                self._cross += e @ x
                self._samples = []

    def _joined(self) -> tuple[torch.Tensor, torch.Tensor]:
        if len(self._samples) > 1:
            xs, es = zip(*self._samples, strict=True)
            self._samples = [(torch.cat(xs, 1), torch.cat(es, 2))]
        return self._samples[0]

    def _operator(self, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        if self.gram is not None:
            gram = self.gram.to(dtype)
            return lambda weights: weights @ gram
        samples = self._joined()[0].to(dtype)
        return lambda weights: (weights @ samples.mT) @ samples


class HeldOut:
    """Samples of one layer that only tell how good a fit is.

    Attributes:
        error: `sum e^2`, `[groups, filters]`.
        energy: `sum t^2` of the targets, `[groups, filters]`.
    """

    def __init__(self, groups: int, filters: int, device: torch.device | None = None):
        self.count = 0
        self.error = torch.zeros(groups, filters, device=device, dtype=torch.float64)
        self.energy = torch.zeros_like(self.error)
        self._samples: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, inputs: torch.Tensor, lacking: torch.Tensor, targets: torch.Tensor) -> None:
        """Add samples: inputs `x`, what outputs lack `e`, what they should be; `[n, groups, ...]`."""
        if len(inputs):
            self.count += len(inputs)
            self._samples.append((inputs.transpose(0, 1), lacking.transpose(0, 1)))
            self.error += lacking.double().square().sum(0)
            self.energy += targets.double().square().sum(0)

    def error_after(self, change: torch.Tensor) -> torch.Tensor:
        """`sum (e - change x)^2` over all processes, for a change of weights `[groups, filters, size]`."""
        error = torch.zeros_like(self.error)
        for left in self._left(change):
            error += left.square().sum(1)
        return all_reduce([error])

    def spread(self, change: torch.Tensor | None = None) -> float:
        """`sum (e - change x - mean)^2` of all filters over all processes: what a bias could not mend."""
        sums = torch.zeros(3, *self.error.shape, device=self.error.device, dtype=torch.float64)
        for left in self._left(change):
            sums += torch.stack([left.square().sum(1), left.sum(1), torch.full_like(sums[0], left.shape[1])])
        squares, total, count = all_reduce([sums])
        return float((squares - total.square() / count.clamp_min(1)).sum())

    def _left(self, change: torch.Tensor | None) -> Iterator[torch.Tensor]:
        """What outputs lack still, `[groups, n, filters]` in float64, piece by piece."""
        for x, e in self._samples:
            yield (e if change is None else e - x @ change.to(x.dtype).mT).double()


def is_distributed() -> bool:
    """Whether other processes have images too."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_reduce(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Sum tensors over the processes of a distributed run in place, all in one message; returns the last of them."""
    if is_distributed():
        device = torch.device('cuda') if dist.get_backend() == 'nccl' else tensors[0].device
        flat = torch.cat([t.flatten().to(device) for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
    return tensors[-1]
