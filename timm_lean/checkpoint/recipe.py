"""What a network is: a timm name, its arguments, and the structural steps taken since.

A recipe is plain JSON data. It is what checkpoints store beside the tensors, and all that is needed to build the same
network again without pickling code. Every technique that changes a network's structure registers its step here.
"""
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import timm
import torch.nn as nn
from timm.models import get_model_args

from timm_lean.errors import LeanError

__all__ = [
    'LEAN_ENTRY', 'Recipe', 'apply_steps', 'build', 'has_step', 'list_steps', 'lost_zeros', 'note_zeros',
    'recipe_of', 'record_step', 'register_step', 'zero_kernels',
]

LEAN_ENTRY = 'lean'  # the timm name under which restructured networks are rebuilt, see models/lean.py

_ZEROS = 'lean_zeros'

Step = dict[str, Any]
_STEPS: dict[str, Callable[..., nn.Module]] = {}


@dataclass
class Recipe:
    """How to build a network.

    Args:
        architecture: A timm model name.
        model_args: Arguments for `timm.create_model`.
        steps: Structural steps in order, each `{'op': name, **arguments}`.
    """
    architecture: str
    model_args: dict[str, Any] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)

    def create_args(self) -> tuple[str, dict[str, Any]]:
        """Name and arguments for `timm.create_model`; restructured networks go through the `lean` entry."""
        if not self.steps:
            return self.architecture, self.model_args
        return LEAN_ENTRY, {**self.model_args, 'base': self.architecture, 'recipe': self.steps}

    @classmethod
    def from_create_args(cls, name: str, args: dict[str, Any]) -> 'Recipe':
        """The recipe whose `create_args` these are."""
        if name != LEAN_ENTRY or not args.get('base'):
            return cls(name, args)
        rest = {k: v for k, v in args.items() if k not in ('base', 'recipe')}
        return cls(args['base'], rest, list(args.get('recipe') or []))


def register_step(op: str) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Decorator: make a function `(model, **arguments) -> model` available as the structural step `op`.

    The function is applied to a network in eval mode whose values do not matter; it must bring about the structure.
    Recording the step is the caller's part: `apply_steps` does it, or the verb that took the step.

    Raises:
        ValueError: The name is taken.
    """
    def register(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        if op in _STEPS:
            raise ValueError(f'The recipe step {op!r} is registered already, by {_STEPS[op].__module__}.')
        _STEPS[op] = function
        return function
    return register


def list_steps() -> list[str]:
    """Names of the registered steps."""
    return sorted(_STEPS)


def has_step(model: nn.Module, op: str) -> bool:
    """Whether a structural step of this name was taken on a model."""
    return any(step['op'] == op for step in getattr(model, 'lean_steps', []))


def record_step(model: nn.Module, op: str, **arguments: Any) -> None:
    """Note on a model that a structural step was taken; what was noted of its zeros before does not hold any more."""
    vars(model).pop(_ZEROS, None)
    model.lean_steps = [*getattr(model, 'lean_steps', []), {'op': op, **arguments}]  # type: ignore[assignment]


def zero_kernels(model: nn.Module) -> int:
    """How many kernels of a model's convolutions and shared bases are zero now."""
    weights = {}
    for module in model.modules():
        weight = getattr(module, 'weight', None)
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        if isinstance(weight, nn.Parameter) and weight.ndim == 4 and not weight.is_meta and not transposed:
            weights[id(weight)] = weight.detach()
    return sum(int((weight == 0).flatten(2).all(2).sum()) for weight in weights.values())


def note_zeros(model: nn.Module) -> None:
    """Note on a model whose kernels were pruned how many of them are zero, so that whoever saves it can tell a loss.

    The note is an attribute, no part of a checkpoint: there the zeros themselves are. The next step ends it.
    """
    vars(model).pop(_ZEROS, None)
    if count := zero_kernels(model):
        setattr(model, _ZEROS, count)


def lost_zeros(model: nn.Module) -> float | None:
    """The share of the noted zeros that is gone, of the part of a model that lost most; None if nothing was noted."""
    noted = [(vars(module)[_ZEROS], zero_kernels(module)) for module in model.modules() if _ZEROS in vars(module)]
    return max((max(before - now, 0) / before for before, now in noted), default=None)


def apply_steps(model: nn.Module, steps: list[Step]) -> nn.Module:
    """Take structural steps on a freshly built network, and record them on it.

    Raises:
        LeanError: A step is malformed, unknown, or fails; then its own error is the cause (--debug shows it).
    """
    for step in steps:
        if not isinstance(step, dict) or not isinstance(step.get('op'), str):
            raise LeanError(f'A recipe step must be an object with an "op", got {repr(step)[:100]}.')
        if step['op'] not in _STEPS:
            raise LeanError(f'Unknown recipe step {step["op"]!r}. This version knows: {", ".join(list_steps())}.')
        function = _STEPS[step['op']]
        arguments = {k: v for k, v in step.items() if k != 'op'}
        try:
            inspect.signature(function).bind(model, **arguments)
        except TypeError as e:
            raise LeanError(f'Recipe step {step["op"]!r} does not take these arguments: {e}.') from e
        try:
            model = function(model.eval(), **arguments)
        except LeanError:
            raise
        except Exception as e:  # values from a file, for a network they were not made for
            raise LeanError(f'The recipe step {step["op"]!r} fails on {type(model).__name__}: {type(e).__name__}: '
                            f'{str(e).partition(chr(10))[0]}') from e
        record_step(model, **step)
    return model.train()


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe of a model that was created by timm.

    Raises:
        LeanError: The model does not know its name or has arguments that are not plain data.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    architecture = cfg.get('architecture')
    if not architecture:
        raise LeanError(f'{type(model).__name__} has no timm name. Create it by timm.create_model.')
    args = get_model_args(model)
    if args.pop('features_only', False):
        raise LeanError('A features_only model cannot be saved by name. Save the classification model it comes from.')
    base = args.pop('base', None)
    args.pop('recipe', None)  # its steps are on the model
    if architecture == LEAN_ENTRY:
        architecture = base
    args = {k: v for k, v in args.items() if k not in ('pretrained_cfg', 'cache_dir')}
    try:
        args = json.loads(json.dumps(args))
    except (TypeError, ValueError) as e:
        raise LeanError(f'The arguments {args!r} of {architecture} are not plain data ({e}), so the model cannot be '
                        'saved by name.') from e
    return Recipe(architecture, args, list(getattr(model, 'lean_steps', [])))


def build(recipe: Recipe) -> nn.Module:
    """Build the network a recipe describes, newly initialized.

    Raises:
        LeanError: The name is unknown or timm refuses the arguments.
    """
    name, args = recipe.create_args()
    if not timm.is_model(recipe.architecture):
        raise LeanError(f'Unknown architecture {recipe.architecture!r}. See `timm-lean models` and timm.list_models().')
    try:
        return timm.create_model(name, **args)
    except LeanError:
        raise
    except Exception as e:  # timm's constructors check nothing: what they raise depends on what they stumble over
        raise LeanError(f'timm cannot create {recipe.architecture!r} with {repr(recipe.model_args)[:300]}: '
                        f'{type(e).__name__}: {str(e).partition(chr(10))[0]}') from e
