"""Files and folders that are either written whole or not at all."""
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from timm_lean.errors import LeanError

__all__ = ['atomic_dir', 'atomic_file', 'output_file', 'writable_dir']


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced to disk and renamed to `path`."""
    path = Path(path)
    writable_dir(path.parent)
    handle, name = tempfile.mkstemp(prefix=f'.{path.name}.', suffix='.tmp', dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, 'rb') as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp creates files only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success its files are moved into `path`, the last one named last."""
    path = Path(path)
    writable_dir(path.parent)
    if path.exists() and not path.is_dir():
        raise LeanError(f'{path} is a file; give the name of a folder.')
    temporary = Path(tempfile.mkdtemp(prefix=f'.{path.name}.', suffix='.tmp', dir=path.parent))
    try:
        yield temporary
        writable_dir(path)
        for file in sorted(temporary.iterdir()):
            os.replace(file, path / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
        raise LeanError(f'Cannot write to the folder {path}: {e.strerror or e}. Choose another output folder.') from e
    return path
