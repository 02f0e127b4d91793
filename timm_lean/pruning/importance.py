"""The kernel criteria as an importance for Torch-Pruning.

    importance = SpectralImportance('spectral_norm')
    tp.pruner.BasePruner(model, inputs, importance=importance, pruning_ratio=0.5, ...)

A channel's value at one layer is the sum of its kernels' scores: over the kernels that make it (output channel), or
over those that read it (input channel). A `Linear` weight is a 1 x 1 kernel.
"""
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch_pruning as tp

from timm_lean.errors import LeanError
from timm_lean.layers import SharedBasisConv2d

from .spectral import check_criterion, kernel_scores

__all__ = ['OutputImportance', 'SpectralImportance']

REDUCTIONS = ('sum', 'mean', 'max', 'prod', 'first', 'gate')
NORMALIZERS = ('sum', 'standarization', 'mean', 'max', 'gaussian', 'lamp')


class SpectralImportance(tp.importance.GroupMagnitudeImportance):
    """Group importance by a kernel criterion.

    The score of channel c of a layer by hand, with `group_reduction='first', normalizer=None`:
    `kernel_scores(layer.weight, criterion)[c].sum()`.

    Args:
        criterion: One of `timm_lean.pruning.ALL_CRITERIA`.
        group_reduction: How the layers of a group are combined: 'sum', 'mean', 'max', 'prod', 'first' or 'gate'.
        normalizer: How a group's values are scaled, which matters when groups are ranked against each other: None,
            'sum', 'mean', 'max', 'gaussian', 'standarization' (Torch-Pruning's spelling), 'lamp', or a function.
        target_types: Which layers count.

    Raises:
        LeanError: An unknown criterion, reduction or normalizer.
    """

    def __init__(
            self,
            criterion: str = 'spectral_norm',
            group_reduction: str = 'mean',
            normalizer: str | Callable[[torch.Tensor], torch.Tensor] | None = 'mean',
            target_types: Sequence[type[nn.Module]] = (nn.modules.conv._ConvNd, nn.Linear, SharedBasisConv2d),
    ):
        if group_reduction not in REDUCTIONS:
            raise LeanError(f'Unknown group_reduction {group_reduction!r}. Known: {", ".join(REDUCTIONS)}.')
        if isinstance(normalizer, str) and normalizer not in NORMALIZERS:
            raise LeanError(f'Unknown normalizer {normalizer!r}. Known: {", ".join(NORMALIZERS)}.')
        super().__init__(
            p=1, group_reduction=group_reduction, normalizer=normalizer, target_types=list(target_types))
        self.criterion = check_criterion(criterion)

    @torch.no_grad()
    def __call__(self, group: Any) -> torch.Tensor | None:
        values, roots = [], []
        for item in group:
            dep, idxs = item
            layer = dep.layer
            if not isinstance(layer, tuple(self.target_types)):
                continue
            per_channel = self._channel_values(layer, dep.pruning_fn)
            if per_channel is None:
                continue
            values.append(per_channel[torch.tensor(idxs, device=per_channel.device)].float())
            roots.append(item.root_idxs)
        if not values:
            return None
        # Torch-Pruning reduces and normalizes in float32
        return self._normalize(self._reduce(values, roots), self.normalizer)

    def _channel_values(self, layer: Any, function: Any) -> torch.Tensor | None:
        """Value of every channel on the pruned side of a layer, None if the layer has no such side."""
        name = function.__name__
        is_out, is_in = 'out_channels' in name, 'in_channels' in name
        if isinstance(layer, SharedBasisConv2d):
            return self._shared_values(layer, is_out)
        if isinstance(layer, nn.Linear):
            scores = self._scores(layer.weight[:, :, None, None])
            return scores.sum(1 if is_out else 0)
        weight = layer.weight
        if weight.ndim != 4:
            return None
        if layer.transposed:
            weight = weight.transpose(0, 1)
        scores = self._scores(weight)
        if is_out:
            return scores.sum(1)
        if not is_in:
            return None
        # the input channels of a group are scored by the filters of that group
        return scores.view(layer.groups, -1, scores.shape[1]).sum(1).flatten()

    def _shared_values(self, layer: SharedBasisConv2d, is_out: bool) -> torch.Tensor:
        if is_out and layer.has_coefficients:
            weight: Any = layer.coeff.weight
            return self._scores(weight).sum(1)
        scores = [self._scores(bank.weight) for bank in layer.banks()]
        if is_out:
            return torch.cat(scores).sum(1)
        groups = layer.banks()[0].groups
        return torch.cat([part.unflatten(0, (groups, -1)) for part in scores], 1).sum(1).flatten()

    def _scores(self, weight: torch.Tensor) -> torch.Tensor:
        return kernel_scores(weight, self.criterion)


class OutputImportance(SpectralImportance):
    """Group importance by what the layers that read a channel lose, on images: the sum over all of them.

    Args:
        scores: Scores of kernels `[N, C / groups]` of layers, see `calibration.output_scores`.
        normalizer: See `SpectralImportance`.
    """

    def __init__(
            self,
            scores: Mapping[nn.Module, torch.Tensor],
            normalizer: str | Callable[[torch.Tensor], torch.Tensor] | None = 'mean',
    ):
        super().__init__(normalizer=normalizer)
        self.scores = scores

    @torch.no_grad()
    def __call__(self, group: Any) -> torch.Tensor | None:
        total = None
        for item in group:
            dep, idxs = item
            if 'in_channels' not in dep.pruning_fn.__name__ or dep.layer not in self.scores:
                continue
            scores = self.scores[dep.layer]
            costs = scores.unflatten(0, (getattr(dep.layer, 'groups', 1), -1)).sum(1).flatten().float()
            if total is None:
                total = costs.new_zeros(len(group[0].idxs))
            # a channel that is concatenated with itself is read more than once
            total.index_add_(0, torch.tensor(item.root_idxs, device=costs.device), costs[idxs])
        return None if total is None else self._normalize(total, self.normalizer)
