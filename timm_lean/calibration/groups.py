"""Layers that share a basis: their moments, and the joint fit of what they share."""
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_lean.layers import SharedBasisConv2d
from timm_lean.layers.shared_basis import bn_scale_shift
from timm_lean.layers.standardized import dense_weight

from .moments import HeldOut, Moments
from .report import LayerFit
from .shared import SharedLayer, alternate, orthonormalize, whitened_basis, whitened_unique

__all__ = ['LARGEST', 'BasisGroup', 'find_groups']

LARGEST = 8192  # inputs of filters whose second moments are kept

_WIDE = 1024  # inputs of layers of which a turn is dear


class BasisGroup:
    """The layers of one basis.

    Args:
        layers: They, by name.
        originals: The original's dense weights of the same layers, `[out, d]`.
    """

    def __init__(self, layers: dict[str, Any], originals: dict[str, torch.Tensor]):
        self.layers = layers
        self.names = list(layers)
        self.basis = layers[self.names[0]].basis
        self.originals = originals
        self.size = next(iter(originals.values())).shape[1]
        self._train: dict[str, Moments] = {}
        self._held: dict[str, HeldOut] = {}

    def add(self, name: str, inputs: torch.Tensor, targets: torch.Tensor, held: torch.Tensor) -> None:
        """Add samples of a layer.

        Args:
            name: The layer.
            inputs: What its filters see, `[n, d]`.
            targets: What its outputs should be, `[n, out]`.
            held: Which samples are held out, `[n]`.
        """
        lacking = targets - inputs @ _dense(self.layers[name]).T
        inputs = F.pad(inputs, (0, 1), value=1.)
        if name not in self._train:
            self._train[name] = Moments(1, targets.shape[1], inputs.shape[1], device=inputs.device)
            self._held[name] = HeldOut(1, targets.shape[1], inputs.device)
        self._train[name].add(inputs[~held, None], lacking[~held, None])
        self._held[name].add(inputs[held, None], lacking[held, None], targets[held, None])

    def fit(self, ridge: float, first: bool) -> LayerFit:
        """Fit basis, unique filters and coefficients to all layers, where that helps, and forget the samples.

        Args:
            ridge: Penalty, relative to the mean diagonal of each layer's second moments.
            first: Start from the whitened singular value decomposition, not from what is there.
        """
        for name in self.names:
            self._train[name].reduce(self._held[name].error, self._held[name].energy)
        samples = sum(moments.count for moments in self._train.values())
        layers = {name: _shared_layer(self.layers[name], self._train.pop(name), self.originals[name], ridge)
                  for name in self.names}
        bank = self.basis.weight
        live = _mask((bank != 0).flatten(2).any(2)[:, :, None].expand(bank.flatten(2).shape).flatten(1))
        basis = bank.detach().flatten(1).double()
        dense = {name: layer.dense(basis) for name, layer in layers.items()}
        # a basis with dead kernels must not be turned, one whose filters are the outputs cannot be
        turnable = live is None and all(
            la.mix is not None and la.live_mix is None and la.live_unique is None for la in layers.values())
        if first and turnable:
            basis = whitened_basis(list(layers.values()), list(self.originals.values()), len(basis))
            for name, layer in layers.items():
                layer.unique = whitened_unique(layer, self.originals[name], basis)
        turns = (5 if first else 2) if self.size <= _WIDE else (3 if first else 1)  # later ones go on where these ended
        basis = alternate(list(layers.values()), basis, turns, live)
        if turnable:
            basis = orthonormalize(list(layers.values()), basis)
        before = after = energy = 0.
        for name, layer in layers.items():
            held = self._held.pop(name)
            before += layer.weight * held.spread()
            after += layer.weight * held.spread(F.pad(layer.dense(basis) - dense[name], (0, 1))[None])
            energy += layer.weight * float(held.energy.sum())
        if after < before:
            bank.copy_(basis.view_as(bank))
            for name, layer in layers.items():
                _assign(self.layers[name], layer)
        return LayerFit(', '.join(self.names), 'group', (before / energy) ** 0.5,
                        (min(before, max(after, 0.)) / energy) ** 0.5, samples)


def find_groups(model: nn.Module, original: nn.Module, names: Sequence[str]) -> list[BasisGroup]:
    """Groups of layers whose basis can be fitted: nothing frozen, not grouped, no batch norm inside that does anything.

    Layers that changed their size have no weights of the original to stay near to, so their basis stays as it is.
    """
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    for name in names:
        layer = model.get_submodule(name)
        if not isinstance(layer, SharedBasisConv2d) or layer.basis is None:
            continue
        if layer.basis.weight[0].numel() <= LARGEST:
            found[id(layer.basis)][name] = layer
    groups = []
    for layers in found.values():
        if all(_is_free(layer) for layer in layers.values()):
            originals = {name: _dense(original.get_submodule(name)).double() for name in layers}
            if all(originals[name].shape == _dense(layer).shape for name, layer in layers.items()):
                groups.append(BasisGroup(layers, originals))
    return groups


def _shared_layer(layer: Any, moments: Moments, original: torch.Tensor, ridge: float) -> SharedLayer:
    """The equations of one layer. A bias, or the batch norm behind, takes the mean: what counts are covariances."""
    gram, cross = _centred(moments)
    penalty = ridge * gram.diagonal().mean().clamp_min(1e-30)
    target = cross + _dense(layer).double() @ gram + penalty * original
    gram.diagonal().add_(penalty)
    weight = 1 / float(((original @ gram) * original).sum().clamp_min(1e-30))
    mix = layer.coeff.weight.detach().flatten(1).double() if layer.has_coefficients else None
    live_mix = None if mix is None else _mask(mix != 0)
    if layer.unique is None:
        return SharedLayer(gram, target, weight, mix, gram.new_zeros(0, len(gram)), live_mix)
    kernels = layer.unique.weight.detach().flatten(2)
    live = _mask((kernels != 0).any(2)[:, :, None].expand(kernels.shape).flatten(1))
    return SharedLayer(gram, target, weight, mix, kernels.flatten(1).double(), live_mix, live)


def _centred(moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """`H` and `R` of the deviations from the means; the samples' last input is 1."""
    assert moments.gram is not None
    gram, cross = moments.gram[0], moments.cross[0]
    total, short = gram[-1, :-1], cross[:, -1]
    return (torch.addr(gram[:-1, :-1], total, total, alpha=-1 / moments.count),
            torch.addr(cross[:, :-1], short, total, alpha=-1 / moments.count))


def _assign(module: Any, layer: SharedLayer) -> None:
    if layer.mix is not None:
        module.coeff.weight.copy_(layer.mix.view_as(module.coeff.weight))
    if module.unique is not None:
        module.unique.weight.copy_(layer.unique.view_as(module.unique.weight))


def _is_free(layer: SharedBasisConv2d) -> bool:
    if not all(p.requires_grad for p in layer.parameters()) or any(bank.groups > 1 for bank in layer.banks()):
        return False
    if isinstance(layer.bn, nn.Identity):
        return True
    scale, shift = bn_scale_shift(layer.bn)
    return bool(((scale - 1).abs() < 1e-4).all() and (shift.abs() < 1e-6).all())


def _dense(layer: Any) -> torch.Tensor:
    weight = layer.dense_weight_bias()[0] if isinstance(layer, SharedBasisConv2d) else dense_weight(layer)
    return weight.flatten(1)


def _mask(live: torch.Tensor) -> torch.Tensor | None:
    return None if bool(live.all()) else live
