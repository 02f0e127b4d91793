"""Build parameter sharing into the stages of a freshly constructed network.

Paper: https://arxiv.org/abs/2006.05066, sections 3.1 (bases) and 4.1 (whole shared convolutions). The first block of
every stage stays as it is (it changes width and resolution); sharing starts at the second block. Every model of this
package builds its sharing here, on timm's own blocks.
"""
from collections.abc import Sequence
from typing import Any

import torch.nn as nn

from timm_lean.errors import LeanError
from timm_lean.layers import FilterBasis, SharedBasisConv2d, init_orthonormal

__all__ = ['share_convs', 'share_filter_basis']


def share_filter_basis(
        stages: Sequence[Any],
        shared_rank: int,
        unique_rank: int,
        dual: bool = False,
        conv_names: Sequence[str] = ('conv1', 'conv2'),
) -> None:
    """Replace k x k convolutions by [unique | shared] filters and coefficients, in place.

    Stage g = 0, 1, ... gets `shared_rank * 2^g` shared and `unique_rank * 2^g` unique filters.

    Args:
        stages: The network's stages, each an `nn.Sequential` of blocks.
        shared_rank: Shared filters in the first stage; 0 leaves unique filters only.
        unique_rank: Unique filters of each convolution in the first stage; 0 leaves shared filters only.
        dual: One basis for each name in `conv_names` instead of one for all, all of a stage jointly orthonormal.
        conv_names: The convolutions of a block that are replaced.

    Raises:
        LeanError: A negative rank, no filters at all, or more filters than an orthonormal basis can have.
    """
    check_ranks(shared_rank, unique_rank)
    for g, stage in enumerate(stages):
        shared, unique = shared_rank * 2 ** g, unique_rank * 2 ** g
        blocks = list(stage)[1:]
        if not blocks:
            continue
        conv = getattr(blocks[0], conv_names[0])
        dim = conv.in_channels // conv.groups * conv.kernel_size[0] * conv.kernel_size[1]
        wanted = shared * (2 if dual else 1) + unique
        if wanted > dim:
            raise LeanError(
                f'Stage {g + 1} would have {wanted} basis filters (shared_rank={shared_rank}, '
                f'unique_rank={unique_rank}, dual={dual}), but filters of {conv.in_channels // conv.groups} x '
                f'{conv.kernel_size[0]} x {conv.kernel_size[1]} have room for {dim} orthonormal ones. '
                'Lower shared_rank or unique_rank.')
        bases: list[FilterBasis | None] = [None]
        if shared:
            bases = [
                FilterBasis(
                    shared, conv.in_channels, conv.kernel_size[0], groups=conv.groups, stage=g, kind='basis',
                    device=conv.weight.device, dtype=conv.weight.dtype)
                for _ in range(2 if dual else 1)]
            if dual:
                init_orthonormal(*(b for b in bases if b is not None))
        for block in blocks:
            for i, name in enumerate(conv_names):
                old = getattr(block, name)
                _check_replaceable(old, stride=(1, 1))
                setattr(block, name, SharedBasisConv2d(
                    old.in_channels, old.out_channels, old.kernel_size[0],
                    basis=bases[i % len(bases)], unique_rank=unique,
                    device=old.weight.device, dtype=old.weight.dtype))


def share_convs(
        stages: Sequence[Any],
        conv_names: Sequence[str],
) -> None:
    """Make the blocks of a stage, from the second on, share whole convolutions, in place.

    Args:
        stages: The network's stages, each an `nn.Sequential` of blocks.
        conv_names: The convolutions of a block that are shared, each one a basis of its own.
    """
    for g, stage in enumerate(stages):
        bases: dict[str, FilterBasis] = {}
        for block in list(stage)[1:]:
            for name in conv_names:
                old = getattr(block, name)
                _check_replaceable(old, stride=(1, 1))
                if name not in bases:
                    bases[name] = FilterBasis(
                        old.out_channels, old.in_channels, old.kernel_size[0], groups=old.groups, stage=g, kind=name,
                        device=old.weight.device, dtype=old.weight.dtype)
                setattr(block, name, SharedBasisConv2d(
                    old.in_channels, old.out_channels, old.kernel_size[0], basis=bases[name],
                    coefficients=False, norm_layer=None))


def check_ranks(shared_rank: int, unique_rank: int) -> None:
    """Raise a LeanError that names the value unless the ranks are whole, not negative and not both zero."""
    for name, rank in (('shared_rank', shared_rank), ('unique_rank', unique_rank)):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise LeanError(f'{name} must be a whole number of at least 0, got {rank!r}.')
    if shared_rank == 0 and unique_rank == 0:
        raise LeanError('shared_rank and unique_rank are both 0: the convolutions would have no filters. '
                         'Give at least one of them a positive value.')


def _check_replaceable(conv: nn.Module, stride: tuple[int, int]) -> None:
    if not isinstance(conv, nn.Conv2d) or conv.stride != stride or conv.dilation != (1, 1) or conv.bias is not None:
        raise LeanError(
            f'A shared convolution must have stride 1, no dilation and no bias, got {conv}. '
            'Sharing does not support output_stride, which dilates convolutions.')
