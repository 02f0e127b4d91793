"""A network for the tensors of a file: checked on the device `meta` first, with memory only if the two fit."""
import math

import torch
import torch.nn as nn

from timm_lean.errors import CheckpointError, LeanError

from .limits import Work, check_numbers, check_steps, check_tensors, limited
from .recipe import Recipe, build

__all__ = ['allocate', 'skeleton']

# Memory a network may take beside the tensors of its file.
_MAX_CUT_OFF = 32 * 2 ** 20  # bytes that it had before it was cut
_MAX_COMPUTED = 32 * 2 ** 20  # bytes of tables that are computed, not stored, and a quarter of the tensors


def skeleton(recipe: Recipe, shapes: dict[str, tuple[int, ...]], what: str) -> tuple[nn.Module, Work]:
    """The network on the device `meta`, if the recipe gives exactly these tensors for no more work than they justify.

    Raises:
        CheckpointError: It does not.
    """
    try:
        check_tensors(shapes)
        check_steps(recipe.steps)
        check_numbers(recipe.model_args, shapes)
        if recipe.steps:  # they may take more work than a network, on a network that is not too much by itself
            with limited(shapes, recipe.architecture), torch.device('meta'):
                build(Recipe(recipe.architecture, recipe.model_args))
        with limited(shapes, recipe.architecture, steps=bool(recipe.steps)) as work, torch.device('meta'):
            model = build(recipe)
    except LeanError as e:
        raise CheckpointError(f'{what} cannot be rebuilt: {e}') from e
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if expected == shapes:
        return model, work
    missing, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected.keys())
    wrong = sorted(k for k in expected.keys() & shapes.keys() if expected[k] != shapes[k])
    found = '; '.join(
        f'{label} {", ".join(keys[:3])}' + (f' and {len(keys) - 3} more' if len(keys) > 3 else '')
        for label, keys in (
            ('missing', missing), ('unexpected', extra),
            ('other shape', [f'{k} {list(shapes[k])} instead of {list(expected[k])}' for k in wrong]),
        ) if keys)
    raise CheckpointError(
        f'{what} does not fit {recipe.architecture!r} with {str(recipe.model_args)[:300]} and '
        f'{len(recipe.steps)} steps: {found}.')


def allocate(recipe: Recipe, shapes: dict[str, tuple[int, ...]], what: str) -> nn.Module:
    """The network with memory for its tensors, whose values do not matter: they come from the file.

    It is built again, unless that would take much more memory than the file's tensors, as for a network that was cut
    from a large one: then its skeleton gets memory.

    Raises:
        CheckpointError: The recipe does not give these tensors, or takes memory that they do not justify.
    """
    model, work = skeleton(recipe, shapes, what)
    size = 4 * sum(map(math.prod, shapes.values()))
    computed = sum(b.numel() * b.element_size() for b in _computed_buffers(model))
    if computed > _MAX_COMPUTED + size // 4:
        raise CheckpointError(f'{what} asks for tables of {computed >> 20:,} MB beside {size >> 20:,} MB of tensors; '
                              'the file is damaged.')
    if work.bytes <= _MAX_CUT_OFF + size + computed:
        return build(recipe)
    return _materialize(model, what)


def _computed_buffers(model: nn.Module) -> list[torch.Tensor]:
    """The buffers that are not stored, because the constructors compute them."""
    buffers = [module._buffers[key] for module in model.modules() for key in module._non_persistent_buffers_set]
    return [buffer for buffer in buffers if buffer is not None]


def _materialize(model: nn.Module, what: str) -> nn.Module:
    """Give a skeleton memory, in place; what layers share stays shared. Computed buffers get their values."""
    allocated: dict[int, torch.Tensor] = {}
    for name, module in model.named_modules():
        if any(isinstance(value, torch.Tensor) for value in vars(module).values()) or (
                module._non_persistent_buffers_set and not hasattr(module, 'init_non_persistent_buffers')):
            raise CheckpointError(f'{what} is cut from a network much larger than its tensors, with values in {name} '
                                  'that only the whole network computes.')
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None and id(tensor) not in allocated:
                    memory = torch.empty_like(tensor, device='cpu')
                    allocated[id(tensor)] = (
                        nn.Parameter(memory, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else memory)
                tensors[key] = None if tensor is None else allocated[id(tensor)]
    for module in model.modules():
        if module._non_persistent_buffers_set:
            module.init_non_persistent_buffers()  # type: ignore[operator]
    return model
