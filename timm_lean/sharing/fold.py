"""Folding shared bases into dense convolutions."""
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.fx
import torch.nn as nn
from timm.layers import BatchNormAct2d

from timm_lean.checkpoint.recipe import record_step, register_step
from timm_lean.errors import LeanError
from timm_lean.layers.lean_report import LeanReport, hand_over
from timm_lean.layers.patterns import Patterns, match_names
from timm_lean.layers.shared_basis import SharedBasisConv2d, bn_scale_shift, is_plain_batchnorm
from timm_lean.measure import count_params

__all__ = ['FoldReport', 'fold']


@dataclass(frozen=True, kw_only=True)
class FoldReport(LeanReport):
    """What `fold` did.

    Attributes:
        folded: Chains that became one dense convolution.
        batchnorms: Batch normalizations behind those that went into the convolution too.
        left: Names of shared layers that could not be folded.
    """
    folded: int
    batchnorms: int
    left: tuple[str, ...]

    def lines(self) -> list[str]:
        text = (f'folded {self.folded} shared convolutions and {self.batchnorms} batch norms into dense convolutions; '
                f'parameters {self.params[0]:,} -> {self.params[1]:,}: a folded file has dense size')
        return [text + (f'; left as they are: {", ".join(self.left)}' if self.left else '')]


def fold(model: nn.Module, *, include: Patterns = None, exclude: Patterns = None) -> nn.Module:
    """Turn every chain filters -> BN -> coefficients (-> BN) into one dense convolution with bias.

    The result computes the same function in eval mode (up to rounding) at the speed of the dense network; sharing, and
    with it the small file, is gone. `features_only` models fold too.

    Args:
        model: A model in eval mode.
        include: Shell patterns on the names of shared convolutions to fold, a list or joined by `|`; all if None.
        exclude: Patterns of those to leave shared.

    Returns:
        A new model in eval mode, with a `FoldReport` as `.lean_report`; the given one is unchanged.

    Raises:
        LeanError: The model is in training mode, where BN is not linear, or has nothing to fold.
    """
    names = [name for name, m in model.named_modules() if isinstance(m, SharedBasisConv2d)]
    wanted, unwanted = (match_names(patterns, names, 'fold', option, 'shared convolution')
                        for option, patterns in (('include', include), ('exclude', exclude)))
    layers = [name for name in names if (include is None or name in wanted) and name not in unwanted]
    new, report = _fold(model, layers)
    record_step(new, 'fold', **({} if len(layers) == len(names) else {'layers': sorted(layers)}))
    return hand_over(new, report, 'Folding')


@register_step('fold')
def _fold_step(model: nn.Module, layers: Sequence[str] | None = None) -> nn.Module:
    """What `fold` recorded: which of the shared convolutions were folded; all if None."""
    names = [name for name, m in model.named_modules() if isinstance(m, SharedBasisConv2d)]
    if unknown := sorted(set(layers or ()) - set(names)):
        raise LeanError(f"The recipe step 'fold' does not fit this network: {unknown[0]!r} is no shared convolution.")
    return _fold(model, names if layers is None else layers)[0]


def _fold(model: nn.Module, layers: Sequence[str]) -> tuple[nn.Module, FoldReport]:
    if model.training:
        raise LeanError('fold() needs the model in eval mode: in training mode batch norm is not linear. '
                        'Call model.eval() first.')
    new = deepcopy(model)
    left, folded, batchnorms = [], 0, 0
    for prefix, parent in list(new.named_modules()):
        shared = {n: m for n, m in parent.named_children() if isinstance(m, SharedBasisConv2d)}
        if not shared:
            continue
        followers = _single_followers(parent)
        for name, layer in shared.items():
            full_name = f'{prefix}.{name}' if prefix else name
            if full_name not in layers:
                continue
            conv = layer.fuse()
            if isinstance(conv, SharedBasisConv2d):
                left.append(full_name)
                continue
            setattr(parent, name, conv)
            folded += 1
            batchnorms += _absorb_batchnorm(parent, conv, followers.get(name))
    if not folded:
        raise LeanError('fold() found no shared convolution to fold in this model. Share first: share(), then fold().')
    return new, FoldReport(params=(count_params(model), count_params(new)), folded=folded, batchnorms=batchnorms,
                           left=tuple(left))


class _ChildTracer(torch.fx.Tracer):
    """Traces one module's own forward; all its children are leaves."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _single_followers(parent: nn.Module) -> dict[str, str]:
    """For each child whose output goes to exactly one other child (called once), that child's name."""
    try:
        nodes = list(_ChildTracer().trace(parent).nodes)
    except Exception:  # forward depends on values: nothing is known about the order, so nothing is absorbed
        return {}
    calls = [node.target for node in nodes if node.op == 'call_module']
    return {
        str(node.target): str(user.target)
        for node in nodes if node.op == 'call_module' and len(node.users) == 1
        for user in node.users
        if user.op == 'call_module' and calls.count(user.target) == 1 and calls.count(node.target) == 1
    }


def _absorb_batchnorm(parent: nn.Module, conv: nn.Module, follower: str | None) -> bool:
    """Scale a convolution by the BN behind it and take the BN out; False if there is none to absorb."""
    if follower is None or not isinstance(conv, nn.Conv2d):
        return False
    owner, name = parent, follower
    module = parent.get_submodule(follower)
    if isinstance(module, nn.Sequential) and len(module):
        owner, name, module = module, '0', module[0]
    if is_plain_batchnorm(module):
        rest: nn.Module = nn.Identity()
    elif isinstance(module, BatchNormAct2d) and module.track_running_stats and isinstance(module.drop, nn.Identity):
        rest = module.act
    else:
        return False
    with torch.no_grad():
        scale, shift = bn_scale_shift(module)
        conv.weight.copy_(conv.weight.double() * scale[:, None, None, None])
        bias = shift if conv.bias is None else conv.bias.double() * scale + shift
        conv.bias = nn.Parameter(bias.to(conv.weight.dtype))
    setattr(owner, name, rest)
    return True
