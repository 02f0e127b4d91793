"""Arguments of what a config names, checked by the signature: a wrong one is one line, not a TypeError."""
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from timm_lean.errors import LeanError

__all__ = ['check_arguments']


def check_arguments(function: Callable[..., Any], given: Iterable[str], user: str) -> None:
    """Check the names of keyword arguments.

    Args:
        function: What is going to be called, or a class.
        given: The names.
        user: Who takes them, for the message.

    Raises:
        LeanError: There is no such argument; the message lists those there are.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = [p.name for p in parameters if p.name not in ('self', 'model')]  # those are not a config's to give
    unknown = [name for name in given if name not in known]
    if unknown:
        raise LeanError(f'{user} has no argument {unknown[0]!r}. It takes {", ".join(known)}.')
