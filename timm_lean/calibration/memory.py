"""Running out of memory: one line that says what to lower."""
from collections.abc import Iterator
from contextlib import contextmanager

from timm_lean.errors import LeanError

__all__ = ['is_out_of_memory', 'memory_told']


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is Python's or torch's error of too little memory; torch's of both kinds are RuntimeErrors."""
    return isinstance(error, MemoryError) or any(
        text in str(error) for text in ('out of memory', "can't allocate memory"))


@contextmanager
def memory_told(limit: float | None = None, work: str = 'Calibration') -> Iterator[None]:
    """Turn too little memory within into a LeanError that says what to lower.

    Args:
        limit: That of calibration for activations, in bytes, where it is kept to.
        work: What is done.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not is_out_of_memory(e):
            raise
        if limit is None:
            raise LeanError(f'{work} ran out of memory: give fewer or smaller images.') from e
        raise LeanError(f'{work} ran out of memory with memory_limit={limit:g} bytes for activations: lower it, or '
                        'give fewer images.') from e
