"""Layers that share a basis: their moments, and the joint fit of what they share."""
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm_lean.layers import SharedBasisConv2d
from timm_lean.layers.shared_basis import bn_scale_shift

from .layers import patches, rows_of
from .moments import Moments
from .report import LayerFit
from .shared import SharedLayer, alternate, orthonormalize, whitened_basis, whitened_unique

__all__ = ['BasisGroup', 'find_groups']

_TURNS = 5


class BasisGroup:
    """The layers of one basis.

    Args:
        layers: They, by name.
        originals: The original's dense weights of the same layers, `[out, d]`.
    """

    def __init__(self, layers: dict[str, Any], originals: dict[str, torch.Tensor]):
        self.layers = layers
        self.names = list(layers)
        self.basis = next(iter(layers.values())).basis
        self.originals = originals
        self.moments: dict[str, Moments] = {}

    def add(
            self, name: str, inputs: torch.Tensor, outputs: torch.Tensor, chosen: torch.Tensor, positions: int,
            seed: int) -> None:
        """Add samples of a layer: its inputs, and the outputs that the original has."""
        layer = self.layers[name]
        rows = rows_of(layer, outputs[chosen])
        generator = torch.Generator().manual_seed(seed)
        places = torch.randperm(rows.shape[1], generator=generator)[:positions].sort().values.to(outputs.device)
        x = F.pad(patches(layer, inputs[chosen], places), (0, 1), value=1.)
        targets = rows[:, places].flatten(0, 1)
        lacking = targets - x[:, :-1] @ _dense(layer).T
        if name not in self.moments:
            self.moments[name] = Moments(1, len(targets[0]), x.shape[1], device=x.device)
        self.moments[name].add(x[:, None], lacking[:, None], targets[:, None])

    def fit(self, ridge: float, first: bool) -> LayerFit:
        """Fit basis, unique filters and coefficients to all layers and forget the samples."""
        layers = []
        for name in self.names:
            self.moments[name].reduce()
            layers.append(self._layer(name, ridge))
        weight = self.basis.weight
        live = _mask(weight.flatten(2).ne(0).any(2)[:, :, None].expand(weight.flatten(2).shape).flatten(1))
        basis = weight.detach().flatten(1).to(layers[0].gram.dtype)
        before = sum(layer.loss(basis) for layer in layers)
        old = basis, [(layer.mix, layer.unique) for layer in layers]
        plain = live is None and all(
            la.mix is not None and la.live_mix is None and la.live_unique is None for la in layers)
        if first and plain:
            basis = whitened_basis(layers, [self.originals[name] for name in self.names], len(basis))
            for layer, name in zip(layers, self.names, strict=True):
                layer.unique = whitened_unique(layer, self.originals[name], basis)
        basis = alternate(layers, basis, _TURNS, live)
        if plain:
            basis = orthonormalize(layers, basis)
        after = sum(layer.loss(basis) for layer in layers)
        if after < before:
            weight.copy_(basis.view_as(weight))
            for layer, name in zip(layers, self.names, strict=True):
                self._assign(self.layers[name], layer)
        count = sum(m.count for m in self.moments.values())
        base = sum(float(m.energy.sum()) * la.weight for m, la in zip(self.moments.values(), layers, strict=True))
        self.moments = {}
        print('group', self.names[0], before, after, base)
        return LayerFit('+'.join(self.names), 'group', before, after, count)

    def _layer(self, name: str, ridge: float) -> SharedLayer:
        layer, moments = self.layers[name], self.moments[name]
        gram, cross = moments.gram[0], moments.cross[0]
        # a bias or the batch norm behind takes the mean: what is left are covariances
        mean = gram[-1, :-1] / moments.count
        short = cross[:, -1] / moments.count
        gram, cross = gram[:-1, :-1] - moments.count * torch.outer(mean, mean), cross[:, :-1] - moments.count * torch.outer(short, mean)
        dense, original = _dense(layer).to(gram.dtype), self.originals[name].to(gram.dtype)
        penalty = ridge * gram.diagonal().mean()
        target = cross + dense @ gram + penalty * original
        gram = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        mix = layer.coeff.weight.detach().flatten(1).to(gram.dtype) if isinstance(layer.coeff, nn.Conv2d) else None
        unique = gram.new_zeros(0, gram.shape[1])
        live_unique = None
        if layer.unique is not None:
            unique = layer.unique.weight.detach().flatten(1).to(gram.dtype)
            live_unique = _mask(layer.unique.weight.flatten(1) != 0)
        return SharedLayer(gram, target, 1 / float(((original @ gram) * original).sum().clamp_min(1e-30)), mix, unique,
                           None if mix is None else _mask(mix != 0), live_unique)

    def _assign(self, module: Any, layer: SharedLayer) -> None:
        if layer.mix is not None:
            module.coeff.weight.copy_(layer.mix.view_as(module.coeff.weight))
        if module.unique is not None:
            module.unique.weight.copy_(layer.unique.view_as(module.unique.weight))


def find_groups(model: nn.Module, original: nn.Module, names: Sequence[str]) -> list[BasisGroup]:
    """Groups of layers whose basis can be fitted."""
    found: dict[int, dict[str, Any]] = defaultdict(dict)
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, SharedBasisConv2d) and layer.basis is not None:
            found[id(layer.basis)][name] = layer
    groups = []
    for layers in found.values():
        if all(_is_free(layer) for layer in layers.values()):
            originals = {name: _dense(original.get_submodule(name)).double() for name in layers}
            if all(originals[name].shape == _dense(layer).shape for name, layer in layers.items()):
                groups.append(BasisGroup(layers, originals))
    return groups


def _is_free(layer: SharedBasisConv2d) -> bool:
    if not all(p.requires_grad for p in layer.parameters()) or any(bank.groups > 1 for bank in layer.banks()):
        return False
    if isinstance(layer.bn, nn.Identity):
        return True
    scale, shift = bn_scale_shift(layer.bn)
    return bool(((scale - 1).abs() < 1e-4).all() and (shift.abs() < 1e-6).all())


def _dense(layer: Any) -> torch.Tensor:
    weight = layer.dense_weight_bias()[0] if isinstance(layer, SharedBasisConv2d) else layer.weight.detach()
    return weight.flatten(1)


def _mask(live: torch.Tensor) -> torch.Tensor | None:
    return None if bool(live.all()) else live
