"""What a technique did to a network: the base of every `model.lean_report`."""
import json
import logging
from dataclasses import asdict, dataclass
from typing import Any

import torch.nn as nn

__all__ = ['LeanReport', 'changed_params', 'hand_over']

_LITTLE = 0.2
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LeanReport:
    """Printable, and plain data by `to_dict()`.

    Attributes:
        params: Parameters before and after, shared ones counted once.
        touched: Parameters of the network before that lie in the layers the technique acted on; None where that says
            nothing about the technique.
    """
    params: tuple[int, int]
    touched: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON data."""
        return json.loads(json.dumps(asdict(self)))

    def lines(self) -> list[str]:
        """The report's own lines."""
        before, after = self.params
        return [f'params {before:,} -> {after:,} ({after / max(before, 1):.3f}x)']

    @property
    def little(self) -> str:
        """A sentence if the technique acted on less than a fifth of the parameters, else ''."""
        if self.touched is None or self.touched >= _LITTLE * self.params[0]:
            return ''
        return (f'only {100 * self.touched / self.params[0]:.1f} % of the {self.params[0]:,} parameters lie in layers '
                'that it acts on')

    def __str__(self) -> str:
        return '\n'.join(self.lines() + ([f'note: {self.little}'] if self.little else []))


def changed_params(old: nn.Module, new: nn.Module) -> int:
    """Parameters of `old` that are not in `new`, or have another shape there."""
    shapes = {name: p.shape for name, p in new.named_parameters()}
    return sum(p.numel() for name, p in old.named_parameters() if shapes.get(name) != p.shape)


def hand_over(model: nn.Module, report: LeanReport, verb: str) -> nn.Module:
    """Put the report on the new model; warn if the technique could do little."""
    if report.little:
        _logger.warning(f'{verb} of {type(model).__name__}: {report.little}.')
    model.lean_report = report  # type: ignore[assignment]
    return model
