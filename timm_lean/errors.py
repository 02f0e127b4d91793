"""The errors a user can cause. The command line prints each as one line and exits with 2, for OutputError with 1."""

__all__ = ['CheckpointError', 'LeanError', 'OutputError', 'PackageMissingError']


class LeanError(ValueError):
    """A request that cannot be met; the message says what, why and what to do."""


class CheckpointError(LeanError):
    """A checkpoint that is damaged, foreign, or does not fit the model."""


class OutputError(LeanError):
    """The disk is full or fails: nothing is wrong with the request, and what was there before is still there."""


class PackageMissingError(LeanError, ImportError):
    """An optional package that is not installed; the message names the extra that brings it."""
