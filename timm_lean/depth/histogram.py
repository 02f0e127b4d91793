"""Shannon entropy of the pixel values of one image.

Paper: `Entropy-Based Convolutional Layer Estimation` - https://arxiv.org/abs/2106.14190 (Gowdra et al. 2021). Its
released script takes, per image, H = -sum_b p_b ln p_b over the histogram p of the pixel values of all pixels and
channels together. That is the mode `pooled`; the others answer neighbouring questions with the same formula.
"""
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from timm_lean.errors import LeanError

__all__ = ['MAX_CHANNELS', 'MODES', 'Pixels', 'check_mode', 'entropies', 'histograms', 'joint_counts', 'read_pixels']

MODES = ('pooled', 'per_channel', 'grayscale', 'joint', 'dataset')
MAX_CHANNELS = 16  # of one image in the mode per_channel
_LEVELS = {'8-bit': 256, '16-bit': 65536}
# Below this many values c ln c is looked up, and numpy counts faster than PIL; above, both turn around.
_SMALL = 1 << 15
_C_LN_C = np.arange(_SMALL + 1) * np.log(np.maximum(np.arange(_SMALL + 1), 1))


class Pixels(NamedTuple):
    """The values of one image, without its alpha channel.

    Attributes:
        values: `[N, C]`, N = height x width; None if `image` has them.
        channels: C.
        depth: '8-bit', '16-bit' or 'float' (values in [0, 1]).
        width: In pixels.
        height: In pixels.
        image: The PIL image of mode L or RGB that has these values, if that is where they came from.
    """
    values: np.ndarray | None
    channels: int
    depth: str
    width: int
    height: int
    image: Image.Image | None = None

    def array(self) -> np.ndarray:
        """The values as `[N, C]`."""
        values = self.values if self.image is None else np.frombuffer(self.image.tobytes(), np.uint8)
        assert values is not None
        return values.reshape(-1, self.channels)


def check_mode(mode: str, bins: int) -> None:
    """Raise a LeanError unless the mode is known and the number of bins makes sense."""
    if mode not in MODES:
        raise LeanError(f'Unknown entropy mode {mode!r}. Known: {", ".join(MODES)}.')
    if not isinstance(bins, int) or isinstance(bins, bool) or not 2 <= bins <= 65536:
        raise LeanError(f'bins must be a whole number from 2 to 65536, got {bins!r}.')


def read_pixels(sample: Any) -> Pixels:
    """The pixel values of an image in any form a dataset may give it in.

    Args:
        sample: PIL image, numpy array `[H, W]` or `[H, W, C]`, or tensor `[H, W]` or `[C, H, W]`, of 8 or 16 bits per
            value or floats in [0, 1]. Palettes are looked up and alpha is dropped: what counts is the colours shown.

    Raises:
        ValueError: Something else; the message says what.
    """
    if isinstance(sample, Image.Image):
        return _from_pil(sample)
    if isinstance(sample, torch.Tensor):
        array = sample.detach().cpu().numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    elif isinstance(sample, np.ndarray):
        array = sample
        if array.ndim == 3 and array.shape[2] > 4 >= array.shape[0]:
            array = np.moveaxis(array, 0, -1)
    else:
        raise ValueError(f'expected a PIL image, an array or a tensor, got {type(sample).__name__}')
    if array.ndim not in (2, 3) or array.size == 0:
        raise ValueError(f'expected [H, W] or [H, W, C] values, got the shape {list(array.shape)}')
    height, width = array.shape[:2]
    values = array.reshape(height * width, -1)
    return Pixels(*_levels(values), width=width, height=height)


def _from_pil(image: Image.Image) -> Pixels:
    mode = image.mode
    if mode not in ('L', 'RGB'):
        if mode.startswith('I') or mode == 'F':
            return Pixels(*_levels(np.asarray(image).reshape(-1, 1)), width=image.width, height=image.height)
        if mode == 'P' and 'transparency' in image.info:
            image = image.convert('RGBA')  # PIL warns about the direct way
        image = image.convert('L' if mode in ('1', 'LA', 'La') else 'RGB')
    width, height = image.size
    return Pixels(None, len(image.mode), '8-bit', width, height, image)  # 'L' has one channel, 'RGB' three


def _levels(values: np.ndarray) -> tuple[np.ndarray, int, str]:
    """`[N, C]` values of any dtype as uint8, uint16 or float64 in [0, 1]; their channels; their depth."""
    channels = values.shape[1]
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == 'b':
        return values.astype(np.uint8) * np.uint8(255), channels, '8-bit'
    if kind == 'u' and size == 1:
        return values, channels, '8-bit'
    if kind in 'iu':
        # PIL opens some 16-bit files as 32-bit integers
        if size < 2 or values.min() < 0 or values.max() > 65535:
            raise ValueError(f'integer values must be of 8 or 16 bits, got {values.dtype} from {values.min()} to '
                             f'{values.max()}')
        return values.astype(np.uint16), channels, '16-bit'
    if kind == 'f':
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also NaN
            raise ValueError(f'float values must lie in [0, 1], got {low:.4g} to {high:.4g}; leave out Normalize')
        return values.astype(np.float64), channels, 'float'
    raise ValueError(f'values of {values.dtype} are not pixels')


def _quantize(values: np.ndarray, depth: str, bins: int) -> np.ndarray:
    """Indices of `bins` equal bins over the dtype's range, as intp."""
    if depth == 'float':
        return np.minimum((values * bins).astype(np.intp), bins - 1)
    return values.astype(np.intp) * bins // _LEVELS[depth]


def _luma(pixels: Pixels) -> Pixels:
    """ITU-R 601 luma, in PIL's rounding; gray images as they are."""
    if pixels.channels == 1:
        return pixels
    if pixels.image is not None:
        return Pixels(None, 1, '8-bit', pixels.width, pixels.height, pixels.image.convert('L'))
    if pixels.channels not in (3, 4):
        raise ValueError(f'grayscale needs 1, 3 or 4 (with alpha) channels, got {pixels.channels}')
    rgb = pixels.array()[:, :3]
    if pixels.depth == 'float':
        gray = np.clip(rgb @ np.array([0.299, 0.587, 0.114]), 0, 1)
    else:
        weighted = rgb.astype(np.int64) @ np.array([19595, 38470, 7471])
        gray = ((weighted + 32768) >> 16).astype(rgb.dtype)
    return Pixels(gray[:, None], 1, pixels.depth, pixels.width, pixels.height)


def histograms(pixels: Pixels, mode: str, bins: int) -> np.ndarray:
    """Histograms `[R, bins]` of an image: one row, or one per channel in the mode per_channel."""
    if mode == 'grayscale':
        pixels = _luma(pixels)
    image, rows = pixels.image, pixels.channels if mode == 'per_channel' else 1
    if rows > MAX_CHANNELS:
        raise ValueError(f'per_channel takes at most {MAX_CHANNELS} channels, got {rows}')
    if pixels.depth == '8-bit' and bins == 256:
        if rows == 1 and (image is None or pixels.width * pixels.height * pixels.channels <= _SMALL):
            return _count_bytes(pixels.array().ravel())[None]
        if image is None:
            return np.stack([_count_bytes(np.ascontiguousarray(column)) for column in pixels.array().T])
        counts = np.array(image.histogram()).reshape(pixels.channels, 256)
        return counts if rows > 1 else counts.sum(0, keepdims=True)
    indices = _quantize(pixels.array(), pixels.depth, bins)
    if rows == 1:
        return np.bincount(indices.ravel(), minlength=bins)[None]
    return np.stack([np.bincount(indices[:, c], minlength=bins) for c in range(rows)])


def _count_bytes(values: np.ndarray) -> np.ndarray:
    """The histogram `[256]` of uint8 values `[N]`."""
    if len(values) <= _SMALL:
        return np.bincount(values, minlength=256)
    return np.array(Image.frombuffer('L', (len(values), 1), values, 'raw', 'L', 0, 1).histogram())


def joint_counts(pixels: Pixels, bins: int) -> np.ndarray:
    """How often each colour (combination of the channels' bins) of an image occurs, `[1, colours]`."""
    if bins ** pixels.channels >= 2 ** 63:
        raise ValueError(f'{pixels.channels} channels of {bins} bins are too many for joint entropy; lower bins')
    # half the width sorts several times as fast
    indices = _quantize(pixels.array(), pixels.depth, bins).astype(
        np.uint32 if bins ** pixels.channels <= 2 ** 32 else np.int64)
    code = indices[:, 0]
    for c in range(1, pixels.channels):
        code = code * bins + indices[:, c]
    return np.unique(code, return_counts=True)[1][None]


def entropies(counts: np.ndarray) -> np.ndarray:
    """Shannon entropy of each histogram.

    Args:
        counts: `[B, K]`, each row with a positive sum.

    Returns:
        `[B]` in nats: H = ln n - (1 / n) sum_k c_k ln c_k.
    """
    n = counts.sum(1)
    # row by row the same whatever the other rows are: how images fall into batches must not change a bit
    weighted = np.empty(len(n))
    small = n <= _SMALL
    weighted[small] = _C_LN_C[counts[small]].sum(1)
    large = counts[~small].astype(np.float64)
    weighted[~small] = (large * np.log(np.maximum(large, 1))).sum(1)
    # exact zeros for constant images, which rounding would miss by 1e-16
    return np.where(counts.max(1) == n, 0., np.log(n) - weighted / n)
