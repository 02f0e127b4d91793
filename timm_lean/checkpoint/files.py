"""Files and folders that are either written whole or not at all, and folders that one run has for itself.

What is being written lies in a folder `.lean-*.tmp` beside its place, and is moved there when it is whole. The writer
holds a lock (`flock`) on that folder. The system frees it when the process ends in whatever way, so that a folder
without a lock is what a killed process left: the next writer in the same place finishes or removes it.
"""
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from timm_lean.errors import LeanError, OutputError

try:
    import fcntl
except ImportError:  # no such locks on Windows: nothing is removed there, and no run is refused
    fcntl = None  # type: ignore[assignment]

__all__ = ['atomic_dir', 'atomic_file', 'lock_dir', 'output_file', 'writable_dir']

_PREFIX, _SUFFIX = '.lean-', '.tmp'
_NEW, _OLD = 'new', 'old'
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield the path to write to; on success what is there is synced to disk and moved to `path`.

    Raises:
        OutputError: The disk is full or fails. What was at `path` is still there.
    """
    path = Path(path)
    with _staging(path) as folder:
        yield folder / path.name
        _settle(folder / path.name)
        os.replace(folder / path.name, path)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder to write to; on success it takes the place of `path`.

    Other files that `path` has are kept.

    Raises:
        LeanError: `path` is a file, or a folder that cannot be moved.
        OutputError: The disk is full or fails. What was at `path` is still there.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise LeanError(f'{path} is a file; give the name of a folder.')
    if Path.cwd().is_relative_to(path) or path.is_mount():
        raise LeanError(f'{path} is in use as the current folder or a mount point; give the name of a folder in it.')
    with _staging(path) as folder:
        new = folder / _NEW / path.name
        new.mkdir(parents=True)
        yield new
        for file in new.rglob('*'):
            if file.is_file():
                _settle(file)
        if path.exists():
            shutil.copymode(path, new)
            (folder / _OLD).mkdir()
            os.rename(path, folder / _OLD / path.name)
            _finish(folder)
        else:
            os.rename(new, path)


@contextmanager
def lock_dir(path: str | Path) -> Iterator[Path]:
    """Have a folder for this process alone, and remove what killed processes left in it.

    The folder itself is locked, so no lock file can be left in the way. Where the file system has no locks, nothing is
    checked.

    Args:
        path: The folder; made if need be.

    Raises:
        LeanError: Another process has it, or files cannot be written to it.
    """
    path = writable_dir(path)
    try:
        lock = _lock(path)
    except BlockingIOError as e:
        raise LeanError(f'{path} is in use by another run. Wait for its end, or choose another folder.') from e
    try:
        _remove_leftovers(path)
        yield path
    finally:
        _unlock(lock)


def output_file(path: str | Path, suffix: str, option: str = '-o') -> Path:
    """Check the name and the folder of a file to be written, before the work of making it.

    Args:
        path: The file.
        suffix: What its name must end in.
        option: The command line option it was given by, for messages.

    Raises:
        LeanError: Another ending, a folder, or a place where files cannot be written.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise LeanError(f'{option} {path}: the name must end in {suffix}.')
    if path.is_dir():
        raise LeanError(f'{option} {path} is a folder; give the name of a file.')
    writable_dir(path.parent)
    return path


def writable_dir(path: str | Path) -> Path:
    """Create a folder if need be; raise a LeanError if files cannot be written to it."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as e:
        kind = OutputError if _disk_error(e) else LeanError
        raise kind(f'Cannot write to the folder {path}: {e.strerror or e}. Choose another output folder.') from e
    return path


@contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A locked temporary folder beside `path`, removed at the end; disk errors within become an OutputError."""
    parent = writable_dir(path.parent)
    _remove_leftovers_once(parent.resolve())
    folder, lock = _make_staging(parent)
    try:
        yield folder
    except Exception as e:
        if reason := _disk_error(e):
            raise OutputError(f'Cannot write {path}: {reason}. Nothing was changed there; make room, or choose another '
                              'place.') from e
        raise
    finally:
        with suppress(OSError):
            _clear(folder)
        _unlock(lock)


def _make_staging(parent: Path) -> tuple[Path, int | None]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=parent))
        with suppress(BlockingIOError, FileNotFoundError):  # until it is locked, others take it for a leftover
            lock = _lock(folder)
            if folder.exists():
                return folder, lock
            _unlock(lock)


def _clear(folder: Path) -> None:
    """Remove a temporary folder, after the end of an exchange of folders that was interrupted in it."""
    _finish(folder)
    shutil.rmtree(folder)


def _finish(folder: Path) -> None:
    """Put the new folder in the place of the old one, if that was taken away; done again after any interruption."""
    for new in (folder / _NEW).glob('*'):
        old = folder / _OLD / new.name
        if old.exists():
            for file in old.iterdir():
                if not (new / file.name).exists():
                    os.rename(file, new / file.name)
            os.rename(new, folder.parent / new.name)


def _remove_leftovers(parent: Path) -> None:
    """Finish or remove what killed processes were writing in a folder."""
    for folder in parent.glob(f'{_PREFIX}*{_SUFFIX}'):
        with suppress(OSError):  # another process writes there, or was faster
            lock = _lock(folder)
            if lock is None:
                return
            try:
                _clear(folder)
            finally:
                _unlock(lock)


_remove_leftovers_once = lru_cache(maxsize=None)(_remove_leftovers)  # a run writes thousands of files into one folder


def _settle(file: Path) -> None:
    """Sync a file to disk, and give it ordinary permissions: safetensors makes files that only their owner can read."""
    with open(file, 'rb') as f:
        os.fsync(f.fileno())
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def _disk_error(error: BaseException | None) -> str | None:
    """What the disk refused, if that is the cause of an error."""
    while error is not None:
        code = error.errno if isinstance(error, OSError) else None
        if found := re.search(r'\(os error (\d+)\)|Os { code: (\d+),', str(error)):  # safetensors' words, new and old
            code = int(found[1] or found[2])
        if code in _DISK_ERRORS:
            return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None


_held: set[int] = set()


def _lock(folder: Path) -> int | None:
    """Lock a folder; None where that is not possible.

    Raises:
        BlockingIOError: Another process has locked it.
    """
    if fcntl is None:
        return None
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise
    except OSError:
        os.close(lock)
        return None
    _held.add(lock)
    return lock


def _unlock(lock: int | None) -> None:
    if lock is not None:
        _held.discard(lock)
        os.close(lock)


def _forget_locks() -> None:
    """In a forked process (a data loader's worker), which must not keep its parent's locks when that one is killed."""
    for lock in _held:
        os.close(lock)
    _held.clear()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_forget_locks)
