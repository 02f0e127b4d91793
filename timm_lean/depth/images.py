"""Where images come from: folders, tar archives, COCO annotations, torch datasets.

A source knows how many images it has, what each is called and how to read one. Names are kept in one block of bytes:
a list of a million strings would be copied into every worker process, page by page, as reference counts change.
"""
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.io import decode_jpeg

from timm_lean.errors import LeanError

__all__ = ['DatasetSource', 'FileSource', 'ImageSource', 'TarSource', 'open_source']

IMAGE_SUFFIXES = (
    '.bmp', '.gif', '.jfif', '.jp2', '.jpe', '.jpeg', '.jpg', '.pbm', '.pgm', '.png', '.pnm', '.ppm', '.tga', '.tif',
    '.tiff', '.webp', '.avif')
VIDEO_SUFFIXES = ('.avi', '.flv', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.wmv')
_READ_WHOLE = 1 << 24  # bytes; larger files are read as PIL likes
_TAR_SUFFIXES = ('.tar', '.tar.gz', '.tgz', '.tar.bz2', '.tar.xz')


class ImageSource:
    """Images by index; `load` runs in worker processes."""

    def __len__(self) -> int:
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What to call an image in a message: its path if it has one."""
        raise NotImplementedError

    def load(self, index: int) -> Any:
        """A PIL image (possibly not decoded yet), array or tensor; whatever exception if it cannot be read."""
        raise NotImplementedError


class _Names(Sequence[str]):
    """Strings in one block of bytes."""

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
        self._blob = b''.join(encoded)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        return os.fsdecode(self._blob[self._ends[index - 1] if index else 0:self._ends[index]])


class FileSource(ImageSource):
    """Image files, in the order given.

    Args:
        paths: The files.
    """

    def __init__(self, paths: Iterable[str | Path]):
        self.names = _Names(map(str, paths))

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    def load(self, index: int) -> Any:
        return _open(self.names[index])


class TarSource(ImageSource):
    """Images in a tar archive; a compressed one is unpacked into a temporary file first, for access by position.

    Args:
        path: The archive.

    Raises:
        LeanError: It is damaged or holds no images.
    """

    def __init__(self, path: Path):
        self.path = path
        self._pid, self._file = -1, None
        members = []
        try:
            self._plain = _unpacked(path)
            with tarfile.open(fileobj=open(self._plain, 'rb'), mode='r:') as tar:
                for member in tar:
                    if member.isfile() and not Path(member.name).name.startswith('.'):
                        members.append((member.name, member.offset_data, member.size))
                    tar.members = []  # type: ignore[attr-defined]  # it would remember them all
        except (tarfile.TarError, OSError, EOFError) as e:
            raise LeanError(f'{path} is not a whole tar archive: {e}') from e
        images = _images_of([m[0] for m in members], str(path))
        chosen = sorted((m for m in members if m[0] in images), key=lambda m: m[0])
        self.names = _Names(m[0] for m in chosen)
        self._places = np.array([m[1:] for m in chosen], np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return f'{self.path}/{self.names[index]}'

    def load(self, index: int) -> Any:
        if self.names[index].lower().endswith(VIDEO_SUFFIXES):
            raise ValueError('a video; extract frames first')
        if self._pid != os.getpid():  # a forked worker shares the file position of the process it comes from
            self._pid, self._file = os.getpid(), open(self._plain, 'rb')  # type: ignore[assignment]  # noqa: SIM115
        offset, size = self._places[index].tolist()
        return _identify(os.pread(self._file.fileno(), size, offset))  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_pid': -1, '_file': None}


class DatasetSource(ImageSource):
    """A torch dataset, or any sequence of images.

    Args:
        dataset: Items are images, tuples that start with one, or mappings with one under image, img, inputs or
            pixel_values.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        reader = getattr(self.dataset, 'reader', None)  # timm's image datasets
        samples = getattr(self.dataset if reader is None else reader, 'samples', None)  # torchvision's, too
        try:
            return str(samples[index][0]) if samples is not None else f'item {index}'
        except (IndexError, TypeError, KeyError):
            return f'item {index}'

    def load(self, index: int) -> Any:
        item = self.dataset[index]
        if isinstance(item, Mapping):
            for key in ('image', 'img', 'inputs', 'pixel_values'):
                if key in item:
                    return item[key]
            raise ValueError(f'the item has no image, only {", ".join(map(str, item))}')
        return item[0] if isinstance(item, (tuple, list)) else item


def open_source(data: Any, images_dir: str | Path | None = None) -> ImageSource:
    """Find the images.

    Args:
        data: A folder (searched with its subfolders), a tar archive, COCO annotations (.json), one image file, or a
            dataset.
        images_dir: For COCO annotations: where their images are; looked for beside the annotations if None.

    Raises:
        LeanError: There are none.
    """
    if isinstance(data, ImageSource):
        return data
    if not isinstance(data, (str, Path)):
        if not hasattr(data, '__getitem__') or not hasattr(data, '__len__'):
            raise LeanError(f'Entropy needs a dataset with a length and items, got {type(data).__name__}. Wrap a '
                            'stream in a dataset with __len__ and __getitem__, or store it as a folder or tar.')
        if len(data) == 0:
            raise LeanError(f'The dataset {type(data).__name__} is empty.')
        return DatasetSource(data)
    path = Path(data)
    if path.is_dir():
        found = sorted(os.path.join(root, f) for root, _, files in os.walk(path, followlinks=True) for f in files)
        images = _images_of(found, str(path))
        return FileSource(f for f in found if f in images)
    if not path.is_file():
        raise LeanError(f'{path} does not exist. Give a folder of images, a tar archive or COCO annotations (.json).')
    if path.name.lower().endswith(_TAR_SUFFIXES):
        return TarSource(path)
    if path.suffix.lower() == '.json':
        return _coco_source(path, images_dir)
    _images_of([str(path)], str(path))
    return FileSource([path])


def _images_of(names: Sequence[str], where: str) -> set[str]:
    """The names of images, and of videos, which are reported one by one when there are images beside them."""
    visible = [n for n in names if not os.path.basename(n).startswith('.')]
    images = {n for n in visible if n.lower().endswith(IMAGE_SUFFIXES)}
    videos = {n for n in visible if n.lower().endswith(VIDEO_SUFFIXES)}
    if images:
        return images | videos
    if videos:
        raise LeanError(f'{where} holds videos ({min(videos)}) and no images. Extract frames first, e.g. '
                        'ffmpeg -i VIDEO frames/%06d.png.')
    kinds = sorted({os.path.splitext(n)[1].lower() or 'no suffix' for n in visible})
    raise LeanError(f'{where} holds no images. ' + (
        f'Found {len(visible)} files ({", ".join(kinds[:5])}); ' if visible else 'It is empty; ')
        + f'images end in {", ".join(IMAGE_SUFFIXES)}.')


def _open(path: str) -> Any:
    if path.lower().endswith(VIDEO_SUFFIXES):
        raise ValueError('a video; extract frames first')
    handle = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(handle).st_size
        # PIL reads headers in many small pieces, which costs tiny files a tenth of the time
        content = os.read(handle, size) if size <= _READ_WHOLE else b''
    finally:
        os.close(handle)
    return _identify(content) if content or not size else Image.open(path)


def _identify(content: bytes) -> Any:
    """A decoded tensor `[C, H, W]` of a plain JPEG, by torchvision in half the time; a PIL image of all else."""
    # a JPEG that does not end in its end marker is cut off, which torchvision would pass over
    if content[:2] == b'\xff\xd8' and content[-2:] == b'\xff\xd9':
        try:
            decoded = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
            if len(decoded) in (1, 3):
                return decoded
        except RuntimeError:
            pass  # a kind it does not know, or broken; PIL takes it or says why not
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError as e:
        # PIL's message has the address of the buffer, which differs between processes
        raise ValueError('not an image that PIL knows' if content else 'the file is empty') from e


def _unpacked(path: Path) -> str:
    """The path of the uncompressed archive; a temporary file that is removed with the process if it must be made."""
    if tarfile.is_tarfile(path):
        try:
            with tarfile.open(path, 'r:'):
                return str(path)
        except tarfile.ReadError:
            pass
    import atexit
    import bz2
    import gzip
    import lzma
    import shutil
    with open(path, 'rb') as f:
        start = f.read(6)
    opener: Any = gzip.open if start[:2] == b'\x1f\x8b' else bz2.open if start[:3] == b'BZh' else lzma.open
    handle, plain = tempfile.mkstemp(prefix='timm-lean-', suffix='.tar')
    atexit.register(_remove, plain, os.getpid())
    try:
        with os.fdopen(handle, 'wb') as target, opener(path, 'rb') as source:
            shutil.copyfileobj(source, target, 1 << 20)
    except (lzma.LZMAError, OSError, EOFError) as e:
        raise LeanError(f'{path} is not a whole tar archive: {e}') from e
    return plain


def _remove(path: str, pid: int) -> None:
    if os.getpid() == pid:  # not in a worker process, which inherits the exit handlers
        Path(path).unlink(missing_ok=True)


def _coco_source(path: Path, images_dir: str | Path | None) -> FileSource:
    try:
        with open(path, encoding='utf-8') as f:
            content = json.load(f)
        names = sorted({str(image['file_name']) for image in content['images']})
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise LeanError(f'{path} is not a COCO annotation file with "images" and their "file_name": '
                        f'{type(e).__name__}: {e}') from e
    if not names:
        raise LeanError(f'{path} lists no images.')
    root = path.parent
    if images_dir is not None:
        candidates = [Path(images_dir)]
    else:
        # DATA/annotations/instances_train2017.json and DATA/train2017/..., or DATA/images/...
        stem = path.stem.rsplit('_', 1)[-1]
        candidates = [base / sub for base in (root, root.parent) for sub in ('', 'images', stem, f'images/{stem}')]
    for candidate in candidates:
        if any((candidate / name).is_file() for name in names[:100]):
            return FileSource(candidate / name for name in names)
    raise LeanError(f'None of the images of {path} (e.g. {names[0]}) is in {", ".join(map(str, candidates))}. '
                    'Say where they are by images_dir / --images-dir.')
