"""Shell patterns on the names of modules: the one way in which layers are chosen or left out."""
from collections.abc import Sequence
from fnmatch import fnmatchcase

from timm_lean.errors import LeanError

__all__ = ['Patterns', 'match_names', 'some_names']

Patterns = str | Sequence[str] | None


def match_names(patterns: Patterns, names: Sequence[str], user: str, option: str, what: str) -> set[str]:
    """The names that match one of some patterns.

    Args:
        patterns: Shell patterns (`layer1.*`): a list, one, or several joined by `|`; None matches nothing.
        names: What to choose from.
        user: Who asks, for the error message.
        option: The name of the option that holds the patterns, for the error message.
        what: What the names are names of, in the singular.

    Raises:
        LeanError: A pattern that matches nothing.
    """
    if patterns is None:
        return set()
    if isinstance(patterns, str):
        patterns = patterns.split('|')
    matched: set[str] = set()
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise LeanError(f'{user}: {option}={pattern!r} matches no {what}. Names are like {some_names(names)}.')
        matched.update(hits)
    return matched


def some_names(names: Sequence[str]) -> str:
    """Up to five names, spread over all of them."""
    step = max(len(names) // 4, 1)
    return ', '.join(names[::step][:5])
