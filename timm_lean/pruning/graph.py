"""Which channels depend on each other: Torch-Pruning's dependency graph, made to understand shared filter bases.

Paper: `DepGraph: Towards Any Structural Pruning` - https://arxiv.org/abs/2301.12900.

A `SharedBasisConv2d` is one node. Its inputs are the input channels of its filters, so layers that share a basis lose
the same input channels; that is an extra edge between them. Its outputs are rows of its coefficients, or, where it has
none, the shared filters themselves; where those are shared that again ties the layers.
"""
import math
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn as nn
import torch_pruning as tp
from timm.layers import CecaModule, EcaModule, ScaledStdConv2d, ScaledStdConv2dSame
from torch_pruning.dependency import Dependency

from timm_lean.errors import LeanError
from timm_lean.layers import FilterBasis, SharedBasisConv2d, SharedBasisLinear, SharedCoefficients

__all__ = [
    'ALONG_CHANNELS', 'build_graph', 'channel_group', 'channel_groups', 'conv_groups', 'is_consistent', 'output_layers',
    'unknown_layer']

ALONG_CHANNELS = (EcaModule, CecaModule)
"""Attention that compares a channel with its neighbours: what goes through it keeps its channels."""

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, SharedBasisConv2d)


class SharedBasisPruner(tp.BasePruningFunc):
    """How Torch-Pruning removes channels of a `SharedBasisConv2d`; what is shared is cut by the first of its layers."""
    TARGET_MODULES = SharedBasisConv2d

    def prune_out_channels(self, layer: SharedBasisConv2d, idxs: Sequence[int]) -> nn.Module:
        keep = _keep(layer.out_channels, idxs)
        layer.out_channels = len(keep)
        if isinstance(layer, SharedBasisLinear):
            layer.out_features = len(keep)
        if isinstance(layer.coeff, SharedCoefficients):
            _cut_filters(layer.coeff.bank, keep)
            layer.coeff.out_channels = len(keep)
            if layer.coeff.bias is not None:
                layer.coeff.bias = _picked(layer.coeff.bias, 0, keep)
        elif layer.has_coefficients:
            tp.prune_conv_out_channels(layer.coeff, list(idxs))
        else:
            assert layer.basis is not None
            _cut_filters(layer.basis, keep)
            layer.shared_rank = len(keep)
        return layer

    def prune_in_channels(self, layer: SharedBasisConv2d, idxs: Sequence[int]) -> nn.Module:
        keep = _keep(layer.in_channels, idxs)
        layer.in_channels = len(keep)
        if isinstance(layer, SharedBasisLinear):
            layer.in_features = len(keep)
        for bank in layer.banks():
            if bank.in_channels != len(keep):
                # the parts of a grouped layer lose the same of their channels, see `conv_groups`
                bank.weight = _picked(bank.weight, 1, keep[:len(keep) // bank.groups])
                bank.in_channels = len(keep)
        return layer

    def get_out_channels(self, layer: SharedBasisConv2d) -> int:
        return layer.out_channels

    def get_in_channels(self, layer: SharedBasisConv2d) -> int:
        return layer.in_channels


class FixedChannelsPruner(tp.BasePruningFunc):
    """For attention along the channels, which has no channels of its own: see `is_consistent`."""
    TARGET_MODULES = ALONG_CHANNELS

    def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: nn.Module) -> None:
        return None

    get_in_channels = get_out_channels


class GainPruner(type(tp.prune_conv_out_channels.__self__)):  # type: ignore[misc]
    """For convolutions that standardize their weights and then give each filter a gain."""
    TARGET_MODULES = (ScaledStdConv2d, ScaledStdConv2dSame)

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> nn.Module:
        keep = _keep(layer.out_channels, idxs)
        super().prune_out_channels(layer, idxs)
        if layer.gain is not None:
            layer.gain = _picked(layer.gain, 0, keep)
        return layer


def _keep(count: int, idxs: Sequence[int]) -> list[int]:
    gone = set(idxs)
    return [i for i in range(count) if i not in gone]


def _cut_filters(bank: FilterBasis, keep: list[int]) -> None:
    if bank.num_filters != len(keep):
        bank.weight = _picked(bank.weight, 0, keep)
        bank.num_filters = len(keep)


def _picked(old: nn.Parameter, dim: int, keep: list[int]) -> nn.Parameter:
    return nn.Parameter(old.detach().index_select(dim, torch.tensor(keep, device=old.device)), old.requires_grad)


class _OneNode(torch.autograd.Function):
    """Stands for a whole layer in the graph: an output of the right shape that depends on the input."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: SharedBasisConv2d) -> torch.Tensor:
        if isinstance(layer, SharedBasisLinear):
            return x.new_zeros(*x.shape[:-1], layer.out_channels)
        return x.new_zeros(len(x), layer.out_channels, *layer.output_size(x.shape[2:]))


@contextmanager
def _unmapped() -> Iterator[set[Any]]:
    """While a graph is built: the operations through which Torch-Pruning fails to map channels, which ends it else."""
    mapping = tp.dependency.index_mapping
    theirs, nodes = mapping.update_index_mapping, set()

    def update(graph: Any) -> None:
        kinds = tp.ops.OPTYPE
        by_kind = {kinds.CONCAT: mapping.update_concat_index_mapping, kinds.SPLIT: mapping.update_split_index_mapping,
                   kinds.RESHAPE: mapping.update_reshape_index_mapping,
                   kinds.UNBIND: mapping.update_unbind_index_mapping,
                   kinds.EXPAND: mapping.update_expand_index_mapping, kinds.SLICE: mapping.update_slice_index_mapping}
        for node in graph.module2node.values():
            try:
                by_kind.get(node.type, lambda *args: None)(graph, node)
            except Exception:  # its arithmetic assumes much about shapes
                nodes.add(node)
    mapping.update_index_mapping = update
    try:
        yield nodes
    finally:
        mapping.update_index_mapping = theirs


def _stand_in(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return _OneNode.apply(x, layer) if isinstance(layer, SharedBasisConv2d) else x * 1


@contextmanager
def _one_node_each(layers: Sequence[nn.Module]) -> Iterator[None]:
    try:
        for layer in layers:
            layer.forward = partial(_stand_in, layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop('forward', None)


def build_graph(model: nn.Module, example_inputs: torch.Tensor) -> Any:
    """Trace a model (left in eval mode) into a `torch_pruning.DependencyGraph`.

    Raises:
        LeanError: The model cannot be traced, or has grouped shared bases.
    """
    shared = [m for m in model.modules() if isinstance(m, SharedBasisConv2d)]
    if not all(map(_is_followed, shared)):
        raise LeanError('Channels of grouped shared bases cannot be pruned where their groups are not those of the '
                        'coefficients. Prune channels first, then share.')
    fixed = [m for m in model.modules() if isinstance(m, ALONG_CHANNELS)]
    gained = [m for m in model.modules() if isinstance(m, GainPruner.TARGET_MODULES)]
    if any(m.groups == m.out_channels > 1 for m in gained):
        gained = []  # depthwise ones need a pruner of their own; timm has none
    pruner = SharedBasisPruner()
    pruners: dict[Any, Any] = {
        SharedBasisConv2d: pruner, SharedBasisLinear: pruner,
        **dict.fromkeys({type(m) for m in fixed}, FixedChannelsPruner()),
        **dict.fromkeys({type(m) for m in gained}, GainPruner())}
    for p in model.parameters():
        p.requires_grad_(True)
    try:
        with (torch.enable_grad(), warnings.catch_warnings(), _one_node_each([*shared, *fixed]),
              _unmapped() as unmapped):
            warnings.simplefilter('ignore')
            graph = tp.DependencyGraph().build_dependency(
                model.eval(), example_inputs, customized_pruners=pruners, verbose=False)
        graph.unmapped = unmapped
        graph.most = 4 * max((max(graph.get_out_channels(m), graph.get_in_channels(m))
                              for m in graph.module2node if isinstance(m, _LAYERS)), default=0)
    except LeanError:
        raise
    except Exception as e:  # tracing runs the model's own code and Torch-Pruning's assumptions about it
        raise LeanError(f'Torch-Pruning cannot trace {type(model).__name__} with an input of shape '
                        f'{list(getattr(example_inputs, "shape", []))}: {type(e).__name__}: '
                        f'{str(e).partition(chr(10))[0][:200]}') from e
    for a, b, function in _ties([layer for layer in shared if layer in graph.module2node], pruner):
        for source, target in ((a, b), (b, a)):
            node = graph.module2node[source]
            node.dependencies.append(
                Dependency(trigger=function, handler=function, source=node, target=graph.module2node[target]))
    return graph


def _is_followed(layer: SharedBasisConv2d) -> bool:
    """Whether it is known which channels of a layer belong together."""
    groups = {bank.groups for bank in layer.banks()}
    return groups == {1} or (layer.has_coefficients and groups == {layer.coeff.groups})


def _ties(
        layers: Sequence[SharedBasisConv2d], pruner: SharedBasisPruner,
) -> Iterator[tuple[SharedBasisConv2d, SharedBasisConv2d, Any]]:
    """Pairs of layers that lose the same input or output channels because they share what has them."""
    inputs: dict[int, list[SharedBasisConv2d]] = {}
    outputs: dict[int, list[SharedBasisConv2d]] = {}
    for layer in layers:
        if layer.basis is not None:
            inputs.setdefault(id(layer.basis), []).append(layer)
        if isinstance(layer.coeff, SharedCoefficients):
            outputs.setdefault(id(layer.coeff.bank), []).append(layer)
        elif not layer.has_coefficients:
            outputs.setdefault(id(layer.basis), []).append(layer)
    for found, function in ((inputs, pruner.prune_in_channels), (outputs, pruner.prune_out_channels)):
        for tied in found.values():
            for a, b in pairwise(tied):
                yield a, b, function


def channel_group(graph: Any, layer: nn.Module, handler: Any, indices: Sequence[int]) -> Any:
    """All that has to leave with some channels of a layer.

    The same as Torch-Pruning's `get_pruning_group`, which follows every path through the network with all its indices;
    where channels are sliced, concatenated or attended to, there are too many. Here each channel of a layer is followed
    once.

    Raises:
        ValueError: Channels pass an operation that Torch-Pruning fails to map, or the model's code folds them into
            another dimension and back, which multiplies their numbers: layers would lose channels they do not have.
    """
    index = tp._helpers._HybridIndex
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.out_channels > 1:
        handler = tp.prune_depthwise_conv_out_channels
    node = graph.module2node[layer]
    root = Dependency(handler, handler, source=node, target=node)
    found = {(id(node), handler): (root, {i: i for i in indices})}
    todo = [(root, [index(idx=i, root_idx=i) for i in indices])]
    while todo:
        before, arrived = todo.pop()
        for dep in before.target.dependencies:
            if not dep.is_triggered_by(before.handler):
                continue
            idxs = arrived
            for mapping in filter(None, dep.index_mapping):
                many = _folded(mapping, idxs)
                if many and many > _channels(graph, dep):  # millions, of attention maps: do not list them
                    raise ValueError('reshapes multiply them')
                idxs = mapping(idxs)
            if not idxs:
                continue
            if dep.target in graph.unmapped:
                raise ValueError(f'through {dep.target.name}')
            _, known = found.setdefault((id(dep.target), dep.handler), (dep, {}))
            new = [i for i in idxs if i.idx not in known]
            for i in new:
                known.setdefault(i.idx, i.root_idx)
            if max((i.idx for i in new), default=0) >= _channels(graph, dep):
                raise ValueError('reshapes multiply them')
            if new:
                todo.append((dep, new))
    group = tp.Group()
    group._DG = graph
    for dep, known in found.values():
        group.add_dep(dep, list(known))
        group[len(group) - 1].root_idxs = list(known.values())
    return group


def _folded(mapping: Any, idxs: Sequence[Any]) -> int:
    """How many channels there are at least behind a mapping that folds another dimension into them; else 0."""
    stride = getattr(mapping, '_stride', 1)
    return 0 if stride == 1 or mapping.reverse else stride * (1 + max((i.idx for i in idxs), default=-1))


def _channels(graph: Any, dep: Dependency) -> int:
    """The number of channels that a dependency can remove some of, more than enough for an operation."""
    module = dep.target.module
    if not isinstance(module, _LAYERS):
        return int(graph.most)
    makes = graph.is_out_channel_pruning_fn(dep.handler)
    return int(graph.get_out_channels(module) if makes else graph.get_in_channels(module))


def channel_groups(graph: Any, ignored: Collection[nn.Module]) -> tuple[list[Any], dict[nn.Module, str]]:
    """The groups of channels that can only leave together, each with all its channels.

    Returns:
        The groups in which no layer that makes the channels is ignored, and the layers whose channels Torch-Pruning
        fails to follow through the model's code, with its error.
    """
    lost: dict[nn.Module, str] = {}
    groups, seen = [], {*ignored, *graph.IGNORED_LAYERS_IN_TRACING}
    for layer in list(graph.module2node):
        if layer in seen or not isinstance(layer, _LAYERS):
            continue
        pruner = graph.get_pruner_of_module(layer)
        try:
            group = channel_group(graph, layer, pruner.prune_out_channels, range(pruner.get_out_channels(layer)))
        except Exception as e:  # its index arithmetic assumes much about reshapes and splits
            lost[layer] = f'{type(e).__name__}: {str(e).partition(chr(10))[0][:100]}'
            continue
        makers = {dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)}
        if makers.isdisjoint(ignored):
            groups.append(group)
        seen |= makers
    return groups, lost


def conv_groups(group: Any) -> int:
    """Into how many parts of equal size a group's channels are divided, by grouped convolutions or group norms."""
    return math.lcm(*(_parts(dep.target.module) for dep, _ in group))


def _parts(module: Any) -> int:
    if isinstance(module, nn.Conv2d) and module.groups < module.out_channels:
        return module.groups
    if isinstance(module, SharedBasisConv2d):
        return module.banks()[0].groups
    return module.num_groups if isinstance(module, nn.GroupNorm) else 1


def is_consistent(group: Any) -> bool:
    """Whether a full group takes each of its convolutions and grouped layers whole.

    It does not where a model's code pads, slices or splits channels in a way the graph misses; to remove channels there
    would pair the wrong ones. Nor may channels go that ECA compares with their neighbours.
    """
    for dep, idxs in group:
        module = dep.target.module
        if isinstance(module, ALONG_CHANNELS):
            return False
        if isinstance(module, nn.GroupNorm):
            count, whole = module.num_channels, module.num_groups > 1
        elif isinstance(module, (nn.Conv2d, SharedBasisConv2d)):
            makes = 'out_channels' in dep.handler.__name__
            count, whole = module.out_channels if makes else module.in_channels, makes or _parts(module) > 1
        else:
            continue
        if sorted(set(idxs)) != list(range(count)) if whole else max(idxs, default=0) >= count:
            return False
    return True


def output_layers(graph: Any) -> list[nn.Module]:
    """The layers whose output channels a network gives back: those behind which no other layer comes."""
    found: list[nn.Module] = []
    seen: set[int] = set()
    todo = [node for node in graph.module2node.values() if not node.outputs]
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node.module, _LAYERS):
            found.append(node.module)
        else:
            todo += node.inputs
    return found


def unknown_layer(group: Any) -> bool:
    """Whether channels of a group are those of filters that are no layer's of a known kind (deformable convolution)."""
    shapes = [dep.target.module.shape for dep, _ in group if isinstance(dep.target.module, nn.Parameter)]
    return any(len(shape) > 2 and min(shape[:2]) > 1 for shape in shapes)
