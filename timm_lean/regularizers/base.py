"""The base class and the registry of regularizers."""
import inspect
import math
from collections.abc import Iterable
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn as nn

from timm_lean.errors import LeanError

from .schedule import Schedule

__all__ = [
    'Regularizer', 'create_regularizer', 'list_regularizers', 'loss_terms', 'parse_regularizer', 'register_regularizer',
    'set_progress',
]

_REGISTRY: dict[str, type['Regularizer']] = {}


class Regularizer:
    """A penalty on the weights of a model.

    Subclasses name themselves, find the layers they act on (`find`) and compute the penalty of those (`compute`).
    Layers are found at a model's first use and remembered for as long as the model lives.

    The weight may follow a `schedule` over training; whoever trains says how far training is by `set_progress`.

    Args:
        weight: Factor of the penalty in the loss, finite and not negative.

    Raises:
        LeanError: The weight is not a finite number of at least 0.
    """
    name: ClassVar[str] = ''
    schedule: Schedule = Schedule()
    progress: float = 0.0

    def __init__(self, weight: float = 1.0):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
            raise LeanError(f'The weight of {self.name!r} must be a finite number of at least 0, got {weight!r}.')
        self.weight = float(weight)
        self._found: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()

    def find(self, model: nn.Module) -> Any:
        """Collect what `compute` needs from the model; raise a LeanError if there is nothing to act on."""
        raise NotImplementedError

    def compute(self, layers: Any) -> torch.Tensor:
        """The unweighted penalty, a scalar, of what `find` returned."""
        raise NotImplementedError

    def raw(self, model: nn.Module) -> torch.Tensor:
        """The unweighted penalty as an fp32 scalar, also under autocast."""
        layers = self._found.get(model)
        if layers is None:
            layers = self._found[model] = self.find(model)
        device = next(model.parameters()).device
        with torch.autocast(device.type, enabled=False):
            return self.compute(layers)

    def __call__(self, model: nn.Module) -> torch.Tensor:
        """The weighted penalty as an fp32 scalar, ready to be added to the loss."""
        return self.scheduled_weight * self.raw(model)

    @property
    def scheduled_weight(self) -> float:
        """The weight at the current progress of training."""
        return self.weight * self.schedule.factor(self.progress)

    def set_schedule(self, schedule: str | Schedule) -> None:
        """Let the weight follow a schedule, e.g. `cosine` or `warmup_linear@0.2` (see `Schedule.parse`)."""
        self.schedule = Schedule.parse(schedule) if isinstance(schedule, str) else schedule

    def set_progress(self, fraction: float) -> None:
        """Say how far training is, 0 at its start and 1 at its end; values beyond are taken as the nearer end."""
        if not math.isfinite(fraction):
            raise LeanError(f'Training progress must be a number in [0, 1], got {fraction!r}.')
        self.progress = min(max(float(fraction), 0.0), 1.0)

    def __repr__(self) -> str:
        schedule = '' if self.schedule == Schedule() else f', schedule={self.schedule}'
        return f'{type(self).__name__}(weight={self.weight:g}{schedule})'


def register_regularizer(cls: type[Regularizer]) -> type[Regularizer]:
    """Class decorator that makes a regularizer available by its name."""
    if not cls.name or cls.name in _REGISTRY:
        raise LeanError(f'{cls.__name__} needs a name that is not taken, got {cls.name!r}.')
    _REGISTRY[cls.name] = cls
    return cls


def list_regularizers() -> list[str]:
    """The names `create_regularizer` knows, sorted."""
    return sorted(_REGISTRY)


def create_regularizer(name: str, **kwargs: Any) -> Regularizer:
    """Create a regularizer by name, e.g. `create_regularizer('basis_ortho', weight=10.0)`.

    Args:
        name: One of `list_regularizers()`.
        **kwargs: Arguments of the regularizer; for each of them also `schedule`, e.g. `'cosine'`.

    Raises:
        LeanError: An unknown name, an unknown argument or a bad value.
    """
    if name not in _REGISTRY:
        raise LeanError(f'Unknown regularizer {name!r}. Known: {", ".join(list_regularizers())}.')
    schedule = kwargs.pop('schedule', None)
    try:
        inspect.signature(_REGISTRY[name]).bind(**kwargs)
    except TypeError as e:
        raise LeanError(f'Regularizer {name!r} does not take these arguments: {e}.') from e
    regularizer = _REGISTRY[name](**kwargs)
    if schedule is not None:
        regularizer.set_schedule(schedule)
    return regularizer


def parse_regularizer(spec: str) -> Regularizer:
    """Create a regularizer from `NAME`, `NAME=WEIGHT` or `NAME=WEIGHT:SCHEDULE`, as given on the command line.

    Further arguments follow after commas: `basis_ortho=10:cosine,include_unique=true`.
    """
    head, *options = spec.split(',')
    head, colon, schedule = head.partition(':')
    name, sep, weight = head.partition('=')
    kwargs: dict[str, Any] = {'schedule': schedule} if colon else {}
    if sep:
        try:
            kwargs['weight'] = float(weight)
        except ValueError:
            raise LeanError(f'--reg {spec!r}: {weight!r} is not a number. Write NAME=WEIGHT, e.g. basis_ortho=10.'
                            ) from None
    for option in options:
        key, sep, value = option.partition('=')
        if not sep:
            raise LeanError(f'--reg {spec!r}: {option!r} is not KEY=VALUE.')
        kwargs[key] = _parse_value(value)
    return create_regularizer(name, **kwargs)


def _parse_value(text: str) -> Any:
    if text.lower() in ('true', 'false'):
        return text.lower() == 'true'
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def loss_terms(regularizers: Iterable[Regularizer], model: nn.Module) -> dict[str, torch.Tensor]:
    """The terms of several regularizers, under the names they are logged by.

    Returns:
        For each regularizer `loss_<name>`, weighted and with gradient, and `<name>`, unweighted and detached.
    """
    terms: dict[str, torch.Tensor] = {}
    for regularizer in regularizers:
        raw = regularizer.raw(model)
        name = regularizer.name
        # The same regularizer may be given twice, e.g. for different layers; a term must not replace another.
        count = 2
        while name in terms:
            name, count = f'{regularizer.name}_{count}', count + 1
        terms[f'loss_{name}'] = regularizer.scheduled_weight * raw
        terms[name] = raw.detach()
    return terms


def set_progress(regularizers: Iterable[Regularizer], fraction: float) -> None:
    """Tell several regularizers how far training is, in [0, 1], for their schedules."""
    for regularizer in regularizers:
        regularizer.set_progress(fraction)
