"""Convolutional Similarity in time linear in the number of filters.

Paper: Belmekki et al. 2024
- https://arxiv.org/abs/2411.03226

For filters `W [M, C, kh, kw]` with cross-correlations `r_ij,c[s] = sum_p W[i,c,p] W[j,c,p+s]` over all shifts s at
which the kernels overlap, `CS(W) = sum_{pairs (i,j)} sum_c sum_s r_ij,c[s]^2`. In a "full" convolution the inner
product of the maps that two kernels make of one image x is `sum_s r_ij[s] a_x[s]`, a_x the image's autocorrelation,
hence at most `||r_ij|| ||a_x||`: the similarity can be lowered without data.

Let `P_ic[f] = |DFT(W[i,c])[f]|^2` at size `2 kh - 1` x `2 kw - 1`, where circular and full correlation agree, and T its
number of frequencies. By Parseval `sum_s r_ij,c[s]^2 = 1/T sum_f P_ic[f] P_jc[f]`. A pair enters through the product of
two numbers only, hence

    sum_{i<j} CS_ij = 1/(2T) sum_{c,f} ( (sum_i P_ic[f])^2 - sum_i P_ic[f]^2 )
    d/dP_ic[f]      = 1/T (sum_j P_jc[f] - P_ic[f])

which needs no pair. The transform of a small kernel at 2k - 1 is one product with a fixed matrix of cosines and sines
(25 x 9 for 3 x 3 kernels, as P is symmetric in f); the matrix carries the factor 1/T.
"""
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from timm_lean.errors import LeanError
from timm_lean.layers.filter_banks import FilterBank
from timm_lean.layers.patterns import Patterns

from .base import register_regularizer
from .filters import FilterRegularizer, total

__all__ = ['ConvSimilarity', 'conv_similarity']

# Weights per chunk. On a CPU the intermediates (6 times the chunk) should stay in cache, on a GPU launches should be
# few; in both cases they must stay below the memory of all weights (_SHARE), save for models so small that it is idle.
_CHUNK_CPU = 2 ** 17
_CHUNK_GPU = 2 ** 22
_CHUNK_LEAST = 2 ** 13
_SHARE = 12


def conv_similarity(weight: torch.Tensor, groups: int = 1, pairs: str = 'all', normalize: bool = False) -> torch.Tensor:
    """Convolutional Similarity of the filters of one convolution.

    Args:
        weight: Filters `[N, C / groups, kh, kw]`.
        groups: Convolution groups; filters of different groups see different inputs and are not compared.
        pairs: `'all'`, or `'adjacent'` for filters (i, i + 1), as in the authors' code.
        normalize: Divide by the number of (group, pair, channel) triples, i.e. the mean of `sum_s r^2`.

    Returns:
        A scalar in fp32 (float64 for float64 weights), differentiable once. 0 if groups have one filter each.

    Raises:
        LeanError: A weight that is not 4-d, groups that do not divide the filters, or unknown `pairs`.
    """
    _check_pairs(pairs)
    if weight.ndim != 4 or groups < 1 or len(weight) % groups:
        raise LeanError(f'conv_similarity needs filters [N, C, kh, kw] with N divisible by groups={groups}, '
                        f'got shape {tuple(weight.shape)}.')
    factor = 1 / _num_terms(weight, groups, pairs) if normalize else 1.0
    return _similarity([weight], [groups], [factor], pairs == 'adjacent')


@register_regularizer
class ConvSimilarity(FilterRegularizer):
    """Sum over the filter banks of their Convolutional Similarity.

    Args:
        weight: The paper's beta.
        pairs: `'all'`, or `'adjacent'` for the authors' released definition.
        normalize: Divide each bank's sum by its pairs x channels (over all groups), so that beta depends less on its
            size. False is the released raw sum.
        include, exclude, skip_stem, skip_1x1: See `FilterRegularizer`.
    """
    name = 'conv_similarity'

    def __init__(
            self,
            weight: float = 1.0,
            pairs: str = 'all',
            normalize: bool = True,
            include: Patterns = None,
            exclude: Patterns = None,
            skip_stem: bool = False,
            skip_1x1: bool = False,
    ):
        super().__init__(weight, include, exclude, skip_stem, skip_1x1)
        _check_pairs(pairs)
        self.pairs = pairs
        self.normalize = self._flag('normalize', normalize)

    def find(self, model: torch.nn.Module) -> list[FilterBank]:
        banks = [bank for bank in super().find(model) if bank.filters_per_group > 1]
        if not banks:
            raise LeanError(f'Regularizer {self.name!r}: no two filters see the same input, nothing to compare.')
        return banks

    def compute(self, layers: list[FilterBank]) -> torch.Tensor:
        places: dict[tuple[torch.device, torch.dtype], list[FilterBank]] = defaultdict(list)
        for bank in layers:
            places[bank.weight.device, bank.weight.dtype].append(bank)
        terms = []
        for banks in places.values():
            weights, groups = [bank.weight for bank in banks], [bank.groups for bank in banks]
            factors = [1 / _num_terms(w, g, self.pairs) if self.normalize else 1.0
                       for w, g in zip(weights, groups, strict=True)]
            terms.append(_similarity(weights, groups, factors, self.pairs == 'adjacent'))
        return total(terms)


def _check_pairs(pairs: str) -> None:
    if pairs not in ('all', 'adjacent'):
        raise LeanError(f"pairs must be 'all' or 'adjacent', got {pairs!r}.")


def _num_terms(weight: torch.Tensor, groups: int, pairs: str) -> int:
    """Number of (group, pair, channel) triples of a bank; at least 1."""
    n = len(weight) // groups
    return max(groups * (n * (n - 1) // 2 if pairs == 'all' else n - 1) * weight.shape[1], 1)


def _similarity(weights: Sequence[torch.Tensor], groups: Sequence[int], factors: Sequence[float], adjacent: bool,
                ) -> torch.Tensor:
    """`sum_layers factor * CS` of weights `[N, C / groups, kh, kw]` of one device and dtype, differentiable once."""
    # 16-bit gradients would be rounded before AMP's loss scale or the regularizer's weight is known
    if torch.compiler.is_compiling() or weights[0].dtype not in (torch.float32, torch.float64):
        return _operator(list(weights), groups, factors, adjacent)
    if not torch.is_grad_enabled() or not any(weight.requires_grad for weight in weights):
        return _value_and_grads(weights, groups, factors, adjacent, None)[0]
    return _WithGradients.apply(groups, factors, adjacent, *weights)


class _WithGradients(torch.autograd.Function):
    """Value and gradients in one pass: most of the work is the same, and backward has only to scale them.

    They are held from forward to backward, one copy of the weights.
    """

    @staticmethod
    def forward(ctx, groups, factors, adjacent, *weights):
        ctx.arguments = groups, factors, adjacent
        ctx.save_for_backward(*weights)
        value, ctx.grads = _value_and_grads(weights, groups, factors, adjacent, 1.)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grads, ctx.grads = ctx.grads, None
        if grads is None:  # they were scaled in place: a second backward of a retained graph
            groups, factors, adjacent = ctx.arguments
            grads = _value_and_grads(ctx.saved_tensors, groups, factors, adjacent, grad)[1]
        else:
            torch._foreach_mul_(grads, grad)
        return None, None, None, *grads


# For torch.compile the sum is one operator with a written-out gradient, which keeps nothing and computes twice.

@torch.library.custom_op('timm_lean::conv_similarity', mutates_args=())
def _operator(weights: Sequence[torch.Tensor], groups: Sequence[int], factors: Sequence[float], adjacent: bool,
              ) -> torch.Tensor:
    """`_similarity`, whose gradient is the other operator."""
    return _value_and_grads(weights, groups, factors, adjacent, None)[0]


@torch.library.custom_op('timm_lean::conv_similarity_grad', mutates_args=())
def _operator_grad(
        grad: torch.Tensor, weights: Sequence[torch.Tensor], groups: Sequence[int], factors: Sequence[float],
        adjacent: bool,
) -> list[torch.Tensor]:
    """The gradient of `_similarity`, a tensor like each weight."""
    return _value_and_grads(weights, groups, factors, adjacent, grad)[1]


def _value_and_grads(
        weights: Sequence[torch.Tensor], groups: Sequence[int], factors: Sequence[float], adjacent: bool,
        scale: torch.Tensor | float | None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The sum, and its gradient times a scale, a tensor like each weight; no gradient if there is no scale."""
    dtype = _compute_dtype(weights[0])
    value = torch.zeros((), dtype=dtype, device=weights[0].device)
    grads = [] if scale is None else [_like(w) for w in weights]
    with torch.autocast(weights[0].device.type, enabled=False):
        for factor, pieces, basis in _chunks(weights, groups, factors):
            filters = _gather(weights, groups, pieces, dtype)
            waves, power = _spectrum(filters, basis)
            slope = _slope(power, adjacent)
            # No term of this product is negative, also in floating point; `||S||^2 - sum ||P||^2` may come out so.
            value += factor / 2 * power.flatten().dot(slope.flatten())
            if scale is None:
                continue
            slope = slope.flatten(1)
            times = scale * (2 * factor)  # d/d waves = 2 waves * d/d power
            if basis is None:
                out = slope.mul_(waves).mul_(times).T
            else:
                waves[:len(slope)] *= slope
                waves[len(slope):] *= slope[1:]
                out = ((basis * times).T @ waves).T
            _scatter(grads, groups, pieces, out.view(filters.shape))
    return value, grads


@_operator.register_fake
def _(weights, groups, factors, adjacent):
    return weights[0].new_empty((), dtype=_compute_dtype(weights[0]))


@_operator_grad.register_fake
def _(grad, weights, groups, factors, adjacent):
    return [_like(w) for w in weights]


def _setup_context(ctx, inputs, output):
    weights, *ctx.arguments = inputs
    ctx.save_for_backward(*weights)


def _backward(ctx, grad):
    return _operator_grad(grad, list(ctx.saved_tensors), *ctx.arguments), None, None, None


_operator.register_autograd(_backward, setup_context=_setup_context)


# A piece is (layer, groups from .. to, channels from .. to); its columns are independent of all others.
Piece = tuple[int, slice, slice]


def _chunks(
        weights: Sequence[torch.Tensor], groups: Sequence[int], factors: Sequence[float],
) -> Iterator[tuple[float, list[Piece], torch.Tensor | None]]:
    """Cut the layers into chunks of pieces with one kernel size, number of filters and factor."""
    on_cpu = weights[0].device.type == 'cpu'
    limit = max(min(_CHUNK_CPU if on_cpu else _CHUNK_GPU, sum(w.numel() for w in weights) // _SHARE), _CHUNK_LEAST)
    buckets: dict[tuple[int, int, int, float], list[int]] = defaultdict(list)
    for i, (weight, g) in enumerate(zip(weights, groups, strict=True)):
        if weight.numel():
            buckets[len(weight) // g, weight.shape[2], weight.shape[3], factors[i]].append(i)
    for (n, kh, kw, factor), layers in buckets.items():
        basis = _basis(kh, kw, _compute_dtype(weights[0]), weights[0].device) if kh * kw > 1 else None
        room = columns = max(limit // (n * kh * kw), 1)
        pieces: list[Piece] = []
        for layer in layers:
            for piece, size in _pieces(layer, groups[layer], weights[layer].shape[1], columns):
                if size > room:
                    yield factor, pieces, basis
                    room, pieces = columns, []
                pieces.append(piece)
                room -= size
        yield factor, pieces, basis


def _pieces(layer: int, groups: int, channels: int, columns: int) -> Iterator[tuple[Piece, int]]:
    """Cut the groups x channels columns of a layer into pieces of at most `columns`, with their sizes."""
    if channels <= columns:  # whole groups
        step = columns // channels
        for g in range(0, groups, step):
            end = min(g + step, groups)
            yield (layer, slice(g, end), slice(0, channels)), (end - g) * channels
        return
    for g in range(groups):
        for c in range(0, channels, columns):
            end = min(c + columns, channels)
            yield (layer, slice(g, g + 1), slice(c, end)), end - c


def _gather(weights: Sequence[torch.Tensor], groups: Sequence[int], pieces: list[Piece], dtype: torch.dtype,
            ) -> torch.Tensor:
    """The kernels of a chunk, `[filters per group, columns, kh * kw]`."""
    parts = [_piece(weights[p[0]], groups[p[0]], p).to(dtype).transpose(0, 1).flatten(1, 2) for p in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _scatter(grads: list[torch.Tensor], groups: Sequence[int], pieces: list[Piece], values: torch.Tensor) -> None:
    """Write `[filters per group, columns, kh * kw]` to where `_gather` read."""
    start = 0
    for piece in pieces:
        target = _piece(grads[piece[0]], groups[piece[0]], piece).transpose(0, 1)  # [n, g, c, k]
        size = target.shape[1] * target.shape[2]
        target.copy_(values[:, start:start + size].view(target.shape))
        start += size


def _piece(weight: torch.Tensor, groups: int, piece: Piece) -> torch.Tensor:
    """`[g, filters per group, c, kh * kw]`, a view of contiguous and of channels_last weights."""
    return weight.flatten(2).unflatten(0, (groups, -1))[piece[1], :, piece[2]]


def _spectrum(filters: torch.Tensor, basis: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Waves `[2 f - 1, filters * columns]`, cosines first, and power `[f, filters, columns]` of a chunk.

    Frequencies come first so that all further work runs over long contiguous rows.
    """
    n, columns, k = filters.shape
    rows = filters.reshape(-1, k).T
    if basis is None:
        return rows, rows.square().view(1, n, columns)
    waves = basis @ rows
    cosines = len(waves) // 2 + 1
    power = waves[:cosines].square()
    power[1:].addcmul_(waves[cosines:], waves[cosines:])
    return waves, power.view(cosines, n, columns)


def _slope(power: torch.Tensor, adjacent: bool) -> torch.Tensor:
    """Derivative of the sum over pairs by each power. As a pair has two ends, the sum is half `<power, slope>`."""
    if adjacent:
        slope = torch.zeros_like(power)
        slope[:, :-1] = power[:, 1:]
        slope[:, 1:] += power[:, :-1]
        return slope
    return power.sum(1, keepdim=True) - power


@lru_cache(maxsize=64)
def _basis(kh: int, kw: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Cosines and sines of the distinct frequencies, `[(2 kh - 1)(2 kw - 1), kh * kw]`; no sine for frequency 0.

    Scaled so that `sum_f P_i[f] P_j[f]` over these rows is the sum over all frequencies, divided by their number.
    """
    height, width = 2 * kh - 1, 2 * kw - 1
    # f and -f have the same power; both sizes are odd, so only 0 is its own mirror image.
    frequencies = [(u, v) for u in range(height) for v in range(width) if (u, v) <= (-u % height, -v % width)]
    angles = torch.tensor([
        [2 * math.pi * (u * y / height + v * x / width) for y in range(kh) for x in range(kw)]
        for u, v in frequencies], dtype=torch.float64)
    scale = torch.full((len(angles), 1), 2 / (height * width), dtype=torch.float64)
    scale[0] /= 2
    scale = scale ** 0.25
    return torch.cat([angles.cos() * scale, angles[1:].sin() * scale[1:]]).to(device, dtype)


def _compute_dtype(weight: torch.Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _like(weight: torch.Tensor) -> torch.Tensor:
    """An empty tensor laid out like the weight if `_piece` can view that, else contiguous."""
    viewable = weight.stride(2) == weight.stride(3) * weight.shape[3] or 1 in weight.shape[2:]
    return torch.empty_like(weight, memory_format=torch.preserve_format if viewable else torch.contiguous_format)
