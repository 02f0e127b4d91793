"""The errors a user can cause. The command line prints each as one line and exits with 2, for OutputError with 1."""
import re
from typing import Any

__all__ = ['CheckpointError', 'LeanError', 'OutputError', 'PackageMissingError', 'cut_words']

_LONG_WORD = re.compile(r'\S{301,}')


class LeanError(ValueError):
    """A request that cannot be met; the message says what, why and what to do.

    It is one line: names in it that are too long to be names (a value of thousands of letters, pasted or from a damaged
    file) are cut, and line breaks are blanks.
    """

    def __init__(self, *args: Any):
        super().__init__(*(cut_words(' '.join(arg.splitlines())) if isinstance(arg, str) else arg for arg in args))


class CheckpointError(LeanError):
    """A checkpoint that is damaged, foreign, or does not fit the model."""


class OutputError(LeanError):
    """The disk is full or fails: nothing is wrong with the request, and what was there before is still there."""


class PackageMissingError(LeanError, ImportError):
    """An optional package that is not installed; the message names the extra that brings it."""


def cut_words(text: str) -> str:
    """The text with the middle of every word of more than 300 characters left out."""
    return _LONG_WORD.sub(lambda word: f'{word[0][:200]}[...]{word[0][-50:]}', text)
