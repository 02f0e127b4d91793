"""The errors a user can cause. The command line prints each as one line and exits with code 2."""

__all__ = ['CheckpointError', 'LeanError', 'PackageMissingError']


class LeanError(ValueError):
    """A request that cannot be met; the message says what, why and what to do."""


class CheckpointError(LeanError):
    """A checkpoint that is damaged, foreign, or does not fit the model."""


class PackageMissingError(LeanError, ImportError):
    """An optional package that is not installed; the message names the extra that brings it."""
