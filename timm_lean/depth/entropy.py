"""Entropy of a dataset: the mean over its images of the Shannon entropy of their pixel values.

Paper: https://arxiv.org/abs/2106.14190. The value is the one the author's released script computes: natural logarithm,
histograms of 256 bins pooled over pixels and channels, averaged over the images.

Every image's entropy is kept (8 bytes each) and sums are exactly rounded (`math.fsum`), so neither the order of the
images nor the number of workers or processes changes the answer by a bit.
"""
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from timm_lean.errors import LeanError

from .histogram import MAX_CHANNELS, check_mode, entropies, histograms, joint_counts, read_pixels
from .images import ImageSource, open_source

__all__ = ['EntropyResult', 'dataset_entropy']

_QUANTILES = (0., 0.05, 0.25, 0.5, 0.75, 0.95, 1.)
_DEPTHS = ('8-bit', '16-bit', 'float')
_BATCH = 64  # images per message of a worker


@dataclass(frozen=True)
class EntropyResult:
    """Entropy of a dataset.

    Attributes:
        nats: Mean over the images, in nats; in the mode dataset the entropy of the one pooled histogram.
        std: Population standard deviation over the images, in nats; 0 in the mode dataset.
        quantiles: Quantiles over the images, in nats, by probability.
        count: Images that were measured.
        total: Images there are.
        mode: What was measured, see `dataset_entropy`.
        bins: Bins of a histogram.
        interval: Of the mean over all images, in nats, if only a sample was measured: at the level `confidence`, by
            the normal approximation with finite population correction. None in the mode dataset.
        confidence: Level of the interval.
        per_channel: Means of the channels, in nats, in the mode per_channel.
        image_size: Median width and height in pixels.
        channels: Channels of most images, alpha not counted.
        formats: Number of images by channels and depth, e.g. `{'3 x 8-bit': 50000}`.
        skipped: Names of the images that could not be read.
        values: Each measured image's entropy in nats, in the order of the dataset.
    """
    nats: float
    std: float
    quantiles: dict[float, float]
    count: int
    total: int
    mode: str
    bins: int
    interval: tuple[float, float] | None
    confidence: float
    per_channel: tuple[float, ...] | None
    image_size: tuple[int, int]
    channels: int
    formats: dict[str, int]
    skipped: tuple[str, ...]
    values: np.ndarray = field(repr=False, compare=False)

    @property
    def bits(self) -> float:
        """`nats` in bits."""
        return self.nats / math.log(2)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the single values."""
        content = {k: v for k, v in asdict(self).items() if k != 'values'}
        content['quantiles'] = {f'{p:g}': q for p, q in self.quantiles.items()}
        return {'bits': self.bits, **content}


@dataclass
class _Batch:
    """What a worker found: rows are images."""
    places: np.ndarray  # int64 [B], where in the result
    values: np.ndarray  # float64 [B, W]
    info: np.ndarray  # int64 [B, 4]: channels (-1: unreadable), depth, width, height
    counts: np.ndarray | None  # int64 [bins], in the mode dataset
    errors: list[tuple[int, str]]


class _Measure(Dataset):
    """Entropies of lists of images; the work of a worker process."""

    def __init__(self, source: ImageSource, chosen: np.ndarray, mode: str, bins: int):
        self.source, self.chosen, self.mode, self.bins = source, chosen, mode, bins
        self.width = MAX_CHANNELS if mode == 'per_channel' else 1

    def __getitem__(self, places: list[int]) -> _Batch:
        values = np.full((len(places), self.width), np.nan)
        info = np.full((len(places), 4), -1, np.int64)
        errors: list[tuple[int, str]] = []
        rows: list[np.ndarray] = []
        owners: list[tuple[int, int]] = []
        for i, place in enumerate(places):
            try:
                pixels = read_pixels(self.source.load(int(self.chosen[place])))
                counts = (joint_counts(pixels, self.bins) if self.mode == 'joint'
                          else histograms(pixels, self.mode, self.bins))
            except MemoryError:
                raise
            except Exception as e:  # decoders meet broken files in every way there is
                errors.append((place, f'{type(e).__name__}: {e}'))
                continue
            info[i] = pixels.channels, _DEPTHS.index(pixels.depth), pixels.width, pixels.height
            if self.mode == 'joint':
                values[i, 0] = entropies(counts)[0]  # as many colours as there are, no common length
            else:
                rows.append(counts)
                owners.extend((i, c) for c in range(len(counts)))
        total = None
        if rows:
            stacked = np.concatenate(rows)
            if self.mode == 'dataset':
                total = stacked.sum(0, dtype=np.int64)
            else:
                at = np.array(owners)
                values[at[:, 0], at[:, 1]] = entropies(stacked)
        return _Batch(np.asarray(places), values, info, total, errors)


def dataset_entropy(
        data: Any,
        mode: str = 'pooled',
        bins: int = 256,
        samples: int | None = None,
        confidence: float = 0.95,
        seed: int = 0,
        workers: int = 0,
        on_error: str = 'raise',
        images_dir: str | Path | None = None,
        progress: bool = False,
) -> EntropyResult:
    """Measure the entropy of a dataset's images.

    With an initialized process group (torchrun) every process measures its part and one all-reduce joins them; all get
    the answer of a single process, bit for bit.

    Args:
        data: A torch dataset with a length (or any sequence of images), a folder, a tar archive, or COCO annotations.
        mode: 'pooled' (all pixels and channels of an image in one histogram, the paper's), 'per_channel' (mean over the
            channels' histograms), 'grayscale' (luma), 'joint' (colours), or 'dataset' (one pooled histogram of all
            images).
        bins: Equal bins over the range of the dtype (256 or 65536 levels; [0, 1] for floats). For 'joint', per channel.
        samples: Measure only so many images, drawn without replacement.
        confidence: Level of the interval around the mean of a sample.
        seed: Seed of the draw.
        workers: Worker processes; 0 reads in this one.
        on_error: 'raise' at the first image that cannot be read (in the dataset's order), or 'skip' it.
        images_dir: For COCO annotations: where the images are.
        progress: Show a progress bar on a terminal.

    Raises:
        LeanError: No images, an unreadable one, images that do not go together, or a bad argument.
    """
    check_mode(mode, bins)
    _check_arguments(samples, confidence, workers, on_error)
    source = open_source(data, images_dir)
    total = len(source)
    chosen = np.arange(total)
    if samples is not None and samples < total:
        chosen = np.sort(np.random.default_rng(seed).choice(total, samples, replace=False))
    measure = _Measure(source, chosen, mode, bins)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    values = np.zeros((len(chosen), measure.width))
    info = np.zeros((len(chosen), 4), np.int64)
    counts = np.zeros(bins if mode == 'dataset' else 0, np.int64)
    for batch in _stream(measure, range(rank, len(chosen), world), workers, progress and rank == 0):
        values[batch.places], info[batch.places] = batch.values, batch.info
        if batch.counts is not None:
            counts += batch.counts
        if batch.errors and on_error == 'raise':
            break  # the others are told by the reduction
    if world > 1:
        values, info, counts = _all_reduce(values, info, counts)

    bad = np.flatnonzero(info[:, 0] < 0)
    if len(bad) and on_error == 'raise':
        # read again, so that every process gives the same reason
        reason = measure[[int(bad[0])]].errors
        raise LeanError(f'The image {source.name(int(chosen[bad[0]]))} cannot be read'
                        f'{f" ({reason[0][1]})" if reason else ""}. Repair or remove it, or skip such images by '
                        'on_error="skip" (--on-error skip).')
    good = np.flatnonzero(info[:, 0] > 0)
    if not len(good):
        reason = measure[[0]].errors
        raise LeanError(f'None of the {len(chosen)} images can be read; the first is {source.name(int(chosen[0]))}'
                        f'{f" ({reason[0][1]})" if reason else ""}.')
    _check_together(source, chosen, info, good, mode)
    skipped = tuple(source.name(int(chosen[b])) for b in bad)
    return _summarize(values[good], info[good], counts, mode, bins, total, confidence, skipped)


def _check_arguments(samples: int | None, confidence: float, workers: int, on_error: str) -> None:
    if samples is not None and (not isinstance(samples, int) or isinstance(samples, bool) or samples < 2):
        raise LeanError(f'samples must be a whole number of at least 2, got {samples!r}.')
    if not 0 < confidence < 1:
        raise LeanError(f'confidence must lie between 0 and 1, got {confidence!r}.')
    if not isinstance(workers, int) or workers < 0:
        raise LeanError(f'workers must be a whole number of at least 0, got {workers!r}.')
    if on_error not in ('raise', 'skip'):
        raise LeanError(f"on_error must be 'raise' or 'skip', got {on_error!r}.")


def _stream(measure: _Measure, places: range, workers: int, progress: bool) -> Iterator[_Batch]:
    batches = [places[i:i + _BATCH] for i in range(0, len(places), _BATCH)]
    loader = DataLoader(
        measure, sampler=batches, batch_size=None, num_workers=min(workers, len(batches)), collate_fn=_as_is)
    with tqdm(total=len(places), desc='entropy', unit='img', disable=None if progress else True) as bar:
        for batch in loader:
            yield batch
            bar.update(len(batch.places))


def _as_is(batch: Any) -> Any:
    return batch


def _all_reduce(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    """Join what the processes measured by one sum.

    Every element but the counts is zero in all processes but one, and a float's bits plus zeros are its bits: summed as
    integers nothing is rounded.
    """
    packed = torch.from_numpy(np.concatenate([np.ascontiguousarray(a).view(np.int64).ravel() for a in arrays]))
    device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
    packed = packed.to(device)
    dist.all_reduce(packed)
    parts = np.split(packed.cpu().numpy(), np.cumsum([a.size for a in arrays])[:-1])
    return tuple(p.view(a.dtype).reshape(a.shape) for p, a in zip(parts, arrays, strict=True))


def _check_together(source: ImageSource, chosen: np.ndarray, info: np.ndarray, good: np.ndarray, mode: str) -> None:
    """Raise a LeanError for images whose histograms do not mean the same."""
    columns = [(1, 'depth', 'Convert them to one depth')]
    if mode == 'per_channel':
        columns.append((0, 'number of channels', "Convert them to one, or use the mode 'pooled'"))
    for column, what, advice in columns:
        kinds, first = np.unique(info[good, column], return_index=True)
        if len(kinds) > 1:
            examples = [
                f'{source.name(int(chosen[good[f]]))} ({_DEPTHS[k] if column == 1 else k})'
                for k, f in zip(kinds.tolist(), first, strict=True)]
            raise LeanError(f'Images of mixed {what}: {", ".join(examples)}. {advice}.')


def _summarize(
        values: np.ndarray, info: np.ndarray, counts: np.ndarray, mode: str, bins: int, total: int, confidence: float,
        skipped: tuple[str, ...],
) -> EntropyResult:
    n, per_channel, interval = len(values), None, None
    channels = Counter(info[:, 0].tolist()).most_common(1)[0][0]
    if mode == 'per_channel':
        values = values[:, :channels]
        per_channel = tuple(math.fsum(column) / n for column in values.T)
        values = values.mean(1, keepdims=True)
    if mode == 'dataset':
        # the same formula on the one histogram; its images have no entropies of their own
        values = entropies(counts[None])[:, None]
    each = values[:, 0]
    mean = math.fsum(each) / len(each)
    std = math.sqrt(math.fsum((each - mean) ** 2) / len(each))
    if mode != 'dataset':
        left = total - len(skipped) - n  # images that were not drawn
        spread = std * math.sqrt(n / (n - 1)) if n > 1 else math.inf if left > 0 else 0.
        half = NormalDist().inv_cdf((1 + confidence) / 2) * spread / math.sqrt(n)
        half = half * math.sqrt(left / max(total - len(skipped), 1)) if left > 0 else 0.
        interval = (mean - half, mean + half)
    formats = Counter(f'{c} x {_DEPTHS[d]}' for c, d in info[:, :2].tolist())
    return EntropyResult(
        nats=mean, std=std, quantiles=dict(zip(_QUANTILES, np.quantile(each, _QUANTILES).tolist(), strict=True)),
        count=n, total=total, mode=mode, bins=bins, interval=interval, confidence=confidence, per_channel=per_channel,
        image_size=(int(np.median(info[:, 2])), int(np.median(info[:, 3]))), channels=channels,
        formats=dict(formats.most_common()), skipped=skipped, values=each)
