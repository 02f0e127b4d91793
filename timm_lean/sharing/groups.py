"""Which layers of a network can share a factor of their weights."""
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

from timm_lean.checkpoint.recipe import has_step
from timm_lean.errors import LeanError
from timm_lean.layers import SharedBasisConv2d
from timm_lean.layers.classifier import classifier_modules
from timm_lean.layers.patterns import Patterns, match_names
from timm_lean.layers.standardized import dense_weight

from .kinds import shape_of, why_not

__all__ = ['Group', 'find_groups']


@dataclass
class Group:
    """Layers of one shape whose weights are written as products, one factor of which they share.

    By rows, `W_l = C_l B`, the layers share the filters `B`; by columns, `W_l = C B_l`, what combines their filters. In
    grouped convolutions that holds for each group of channels by itself.

    Attributes:
        stage: The stage of the layers.
        kind: Their shape in words; tells the groups of a stage apart.
        names: Their names. One layer alone shares with nobody: its weight is an ordinary product.
        weights: Their weights, `[parts, out / parts, d]` each, `d` the inputs of one filter.
        kernel_size: Side of the kernels.
        linear: Whether they are linear layers.
        dense: Parameters of the layers that the factors take the place of.
        form: 'rows' or 'columns'.
        kept: For each form the share of energy that the first factors keep, `[full rank]`; see `spectra`.
        leading: For each form what gives the factors that keep it: from a rank to `[parts, rank, d]` by rows, and to
            `[parts, rank, out / parts]` by columns.
    """
    stage: int
    kind: str
    names: list[str]
    weights: list[torch.Tensor]
    kernel_size: int
    linear: bool
    dense: int
    form: str = 'rows'
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    leading: dict[str, Callable[[int], torch.Tensor]] = field(default_factory=dict)

    @property
    def parts(self) -> int:
        """Groups of the convolutions."""
        return self.weights[0].shape[0]

    @property
    def out(self) -> int:
        """Outputs of one part."""
        return self.weights[0].shape[1]

    @property
    def dim(self) -> int:
        """Inputs of one filter."""
        return self.weights[0].shape[2]

    @property
    def forms(self) -> list[str]:
        """The forms that come into question."""
        pointwise = self.kernel_size == 1 and self.parts == 1 and len(self.names) > 1
        return ['rows', 'columns'] if pointwise else ['rows']

    @property
    def must_pay(self) -> bool:
        """Whether the layers stay as they are where factors are no smaller; k x k convolutions share all the same."""
        return len(self.names) == 1 or self.kernel_size == 1 or self.parts > 1

    @property
    def full_rank(self) -> int:
        return len(self.kept[self.form])

    def unique(self, rank: int, wanted: int, form: str = '') -> int:
        """Unique filters that can still find a direction beside `rank` shared ones."""
        if (form or self.form) == 'columns' or len(self.names) == 1:
            return 0
        return max(min(wanted, self.out, self.dim - rank), 0)

    def cost(self, rank: int, wanted: int, bn: bool = False, form: str = '') -> int:
        """Parameters of the factors and the batch norms between, `rank` and `wanted` filters for each part."""
        form = form or self.form
        layers, unique = len(self.names), self.unique(rank, wanted, form)
        norms = 2 * (bn and not self.linear)
        if form == 'columns':
            return rank * self.out + layers * rank * (self.dim + norms)
        own = unique * self.dim + (self.out + norms) * (rank + unique)
        return self.parts * (rank * self.dim + layers * own)


def find_groups(
        model: nn.Module, dual: bool, stages: Sequence[int] | None, include: Patterns, exclude: Patterns,
        alone: bool, classifier: bool,
) -> tuple[list[Group], dict[str, str]]:
    """The groups, and why the other layers that hold weights are in none.

    Raises:
        LeanError: There is no group, or weights that cannot be shared.
    """
    layers, left = _candidates(model, classifier)
    wanted, unwanted = (match_names(patterns, list(layers), 'share', option, 'layer that could share')
                        for option, patterns in (('include', include), ('exclude', exclude)))
    stage_of = _stage_index(model)
    found: dict[tuple, list[str]] = defaultdict(list)
    for name, layer in layers.items():
        stage = stage_of(name)
        if (stages is not None and stage not in stages) or (include is not None and name not in wanted) or (
                name in unwanted):
            left[name] = 'left out'
            continue
        leaf = name.rpartition('.')[2] if dual else ''
        key = (stage, *shape_of(layer), isinstance(layer, nn.Linear), leaf)
        found[key].append(name)
    groups = []
    for (stage, inputs, outputs, side, parts, linear, leaf), names in found.items():
        if len(names) == 1 and not alone:
            left[names[0]] = 'no other layer of its shape in its stage'
            continue
        # bases of one kind are orthogonal to each other in `basis_ortho`; those of two groups here need not be
        kind = '-'.join([f'{inputs}-{outputs}-{side}', *([f'g{parts}'] if parts > 1 else []),
                         *(['linear'] if linear else []), *([leaf] if leaf else [])])
        group = Group(stage, kind, names, [_weight(model, n) for n in names], side, linear,
                      sum(_parameters(layers[n]) for n in names))
        if group.must_pay and group.cost(1, 0) >= group.dense:
            left.update(dict.fromkeys(names, 'too small'))
            continue
        groups.append(group)
    if not groups:
        chosen = stages is not None or include is not None or exclude is not None
        where = ' that stages, include and exclude leave' if chosen else ''
        raise LeanError(f'{type(model).__name__} has no two layers of one shape in one stage{where} that could share: '
                        'there is nothing to share.')
    return groups, left


def _candidates(model: nn.Module, classifier: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Layers that could be factorized, and why others could not."""
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    heads = set() if classifier else set(classifier_modules(model))
    shared = tuple(n + '.' for n, m in model.named_modules() if isinstance(m, SharedBasisConv2d))
    layers, left = {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)) or name.startswith(shared):
            continue
        reason = 'classifier' if module in heads else why_not(module)
        if not reason and (places[id(module)] > 1 or uses[id(module.weight)] > 1):
            reason = 'used in several places'
        if reason:
            left[name] = reason
        else:
            layers[name] = module
    return layers, left


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    layer: Any = model.get_submodule(name)
    weight = dense_weight(layer)
    parts = shape_of(layer)[3]
    if weight.is_meta:  # asked for the sizes alone
        return weight.flatten(1).unflatten(0, (parts, -1))
    if has_step(model, 'prune_kernels') and not bool((layer.weight != 0).flatten(2).any(2).all()):
        raise LeanError(f'The kernels of {name} and its group have been pruned, and a shared basis would fill them in. '
                        'Share first and prune the shared network: share(), then prune_kernels(). Or leave the pruned '
                        'layers alone by exclude.')
    if not weight.isfinite().all():
        raise LeanError(f'The weights of {name} and its group hold values that are not finite.')
    return weight.flatten(1).unflatten(0, (parts, -1))


def _parameters(layer: nn.Module) -> int:
    """Parameters of a layer but its bias, which stays."""
    return sum(p.numel() for name, p in layer.named_parameters(recurse=False) if name != 'bias')


def _stage_index(model: nn.Module) -> Any:
    """A function from a module's name to its stage: the first feature level whose module has not passed yet.

    timm's CNNs register their modules in the order of execution. A `features_only` network joins names by `_`. Of a
    network without feature levels, such as a detector, the parts that its names tell apart are the stages.
    """
    info: Any = getattr(model, 'feature_info', None)
    levels = [i['module'] for i in (info if isinstance(info, (list, tuple)) else getattr(info, 'info', None) or [])
              if isinstance(i, dict) and i.get('module')]
    names = [name for name, _ in model.named_modules()]
    if not levels:
        parts = list(dict.fromkeys(_part(name) for name in names))
        return lambda name: parts.index(_part(name))
    flat = [name.replace('.', '_') + '_' for name in names]
    ends = [max((i for i, n in enumerate(flat) if n.startswith(level.replace('.', '_') + '_')), default=-1)
            for level in levels]
    position = {name: i for i, name in enumerate(names)}
    return lambda name: sum(0 <= end < position[name] for end in ends)


def _part(name: str) -> str:
    """The part of a network that a module is in: its name up to the first number (`backbone.layer2`, `neck.convs`)."""
    words: list[str] = []
    for word in name.split('.')[:-1]:
        if word.isdigit():
            break
        words.append(word)
        if word[-1].isdigit():
            break
    return '.'.join(words)
