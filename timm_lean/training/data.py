"""Images for training and evaluation: image folders by timm, scikit-learn's digits, and a cache on the device."""
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageDataset, create_loader, is_img_extension, resolve_data_config
from timm.data.transforms import ToNumpy
from timm.models import get_model_input_config
from torch.utils.data import Dataset
from torchvision import transforms

from timm_lean.errors import LeanError

from .config import TrainConfig

__all__ = [
    'CachedLoader', 'DigitsDataset', 'SplitError', 'class_names', 'create_eval_loader', 'create_train_loader',
    'digits_split', 'model_data_config', 'open_dataset', 'open_eval_loader',
]

CROP_PADDING = 4  # pixels, as in the CIFAR recipes
_TRAIN_DIRS = ('train',)
_EVAL_DIRS = ('val', 'validation', 'test')


class SplitError(LeanError):
    """Data without the images of a split, or without their labels."""


def digits_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits (UCI): all but every fifth one for 'train', every fifth one for others.

    Returns:
        Pixels `[N, 8, 8]` from 0 to 16, and classes `[N]`.
    """
    from sklearn.datasets import load_digits
    digits = load_digits()
    chosen = (np.arange(len(digits.target)) % 5 == 0) == (split != 'train')
    return digits.images[chosen], digits.target[chosen]


class DigitsDataset(Dataset):
    """A split of the handwritten digits as PIL images; see `digits_split`."""

    def __init__(self, split: str, img_size: int = 32, mode: str = 'RGB'):
        images, targets = digits_split(split)
        pixels = (images * (255 / 16)).round().astype(np.uint8)
        size = (img_size, img_size)
        self.images = [Image.fromarray(p).resize(size, Image.Resampling.BILINEAR).convert(mode) for p in pixels]
        self.targets = [int(t) for t in targets]
        self.class_to_idx = {str(i): i for i in range(10)}
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (self.transform(image) if self.transform else image), self.targets[index]


class _StrictImageDataset(ImageDataset):
    """timm's ImageDataset, except that an image that cannot be read is an error instead of another image."""

    def __getitem__(self, index: int) -> Any:
        path, target = self.reader.samples[index]
        try:
            with Image.open(path) as f:
                image = f.convert(self.input_img_mode)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise LeanError(f'The image {path} cannot be read ({e}). Repair or remove it.') from e
        return (self.transform(image) if self.transform else image), target


def open_dataset(
        data: str,
        data_dir: str | None,
        split: str,
        in_chans: int = 3,
        img_size: int = 32,
        limit: int | None = None,
        labels: bool = True,
) -> Any:
    """Open a dataset split.

    Args:
        data: 'digits' or 'folder'.
        data_dir: For 'folder': the folder that holds train/ and val/ or test/; for evaluation also a folder of classes.
        split: 'train' or 'eval'.
        in_chans: 1 for gray, 3 for RGB.
        img_size: Size the digits are enlarged to.
        limit: Use only so many images, evenly over the classes.
        labels: Whether they are needed; without, images may lie in no class folder, those for training also in
            `data_dir` itself.

    Raises:
        SplitError: No images of this split, or labels that are needed and not there.
        LeanError: A missing folder, or a number of channels images do not have.
    """
    modes = {1: 'L', 3: 'RGB'}
    if in_chans not in modes:
        raise LeanError(f'The model has in_chans={in_chans}; images give 1 (gray) or 3 (RGB).')
    if data == 'digits':
        dataset: Any = DigitsDataset(split, img_size, modes[in_chans])
        samples = list(enumerate(dataset.targets))
    else:
        root = _split_dir(data_dir, split, labels)
        expected = f'Expected {root}/CLASS/IMAGE.jpg (or .png).'
        try:
            dataset = _StrictImageDataset(root=str(root), reader='folder', input_img_mode=modes[in_chans])
        except RuntimeError as e:
            raise SplitError(f'{root} holds no images in class folders. {expected}') from e
        dataset.class_to_idx = dataset.reader.class_to_idx
        samples = [(i, target) for i, (_, target) in enumerate(dataset.reader.samples)]
        if labels and (unlabelled := dataset.class_to_idx.get('')) is not None:
            path = next(path for path, target in dataset.reader.samples if target == unlabelled)
            raise SplitError(f'{path} lies in no class folder, so it has no label. {expected}')
    if limit is not None and limit < len(samples):
        classes, chosen = dataset.class_to_idx, _balanced(samples, limit)
        if data == 'digits':
            dataset.images = [dataset.images[i] for i in chosen]
            dataset.targets = [dataset.targets[i] for i in chosen]
        else:
            dataset.reader.samples = [dataset.reader.samples[i] for i in chosen]
        dataset.class_to_idx = classes
    return dataset


def _split_dir(data_dir: str | None, split: str, labels: bool) -> Path:
    root = Path(data_dir or '')
    if not data_dir or not root.is_dir():
        raise LeanError(f'The data folder {str(data_dir)!r} does not exist. Give --data-dir DIR, a folder with train/ '
                        'and val/ or test/, each with one folder per class.')
    names = _TRAIN_DIRS if split == 'train' else _EVAL_DIRS
    for name in names:
        if (root / name).is_dir():
            return root / name
    if split == 'eval' and not (root / 'train').is_dir():
        return root  # a folder of class folders
    if split == 'train' and not labels and not any((root / name).is_dir() for name in _EVAL_DIRS) and any(
            is_img_extension(path.suffix.lower()) for path in root.iterdir()):
        return root  # a folder of images
    raise SplitError(f'{root} has no {" or ".join(n + "/" for n in names)} folder. Found: '
                     f'{", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"}.')


def _balanced(samples: list[tuple[int, int]], limit: int) -> list[int]:
    """The first images of each class in turn, in the original order."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for index, target in samples:
        by_class[target].append(index)
    rounds = range(max(map(len, by_class.values())))
    ordered = [indices[r] for r in rounds for _, indices in sorted(by_class.items()) if r < len(indices)]
    return sorted(ordered[:limit])


def class_names(dataset: Any) -> list[str]:
    """Class names by index."""
    return [name for name, _ in sorted(dataset.class_to_idx.items(), key=lambda item: item[1])]


def create_train_loader(
        dataset: Any, config: TrainConfig, data_config: dict[str, Any], device: torch.device, rank: int, world: int,
) -> Any:
    """The training batches `([B, C, H, W] normalized, [B])` on the device, by timm or from the cache."""
    if len(dataset) < config.batch_size * world:
        raise LeanError(f'{len(dataset)} training images do not fill one batch of {config.batch_size} on {world} '
                        'process(es). Lower --batch-size.')
    hflip = config.hflip if config.hflip is not None else (0. if config.data == 'digits' else 0.5)
    if config.cache:
        padding = CROP_PADDING if config.aug == 'crop' else 0
        return CachedLoader(
            dataset, data_config, config.batch_size, device, padding=padding, hflip=hflip, shuffle=True,
            rank=rank, world=world)
    loader = create_loader(
        dataset, data_config['input_size'], config.batch_size, is_training=True, no_aug=config.aug == 'none',
        hflip=hflip, color_jitter=0., auto_augment=config.auto_augment, re_prob=config.re_prob,
        interpolation=data_config['interpolation'], mean=data_config['mean'], std=data_config['std'],
        num_workers=config.workers, distributed=world > 1, device=device, pin_memory=device.type == 'cuda',
        # fresh workers each epoch take their seeds from the epoch's seed, so an epoch does not depend on earlier ones
        persistent_workers=False)
    if config.aug == 'crop':
        size = data_config['input_size'][-2:]
        dataset.transform = transforms.Compose([
            transforms.Resize(size), transforms.RandomCrop(size, padding=CROP_PADDING),
            transforms.RandomHorizontalFlip(hflip), ToNumpy()])
    return loader


def create_eval_loader(
        dataset: Any,
        data_config: dict[str, Any],
        batch_size: int,
        device: torch.device,
        workers: int = 2,
        cache: bool = False,
        rank: int = 0,
        world: int = 1,
) -> Any:
    """Evaluation batches in order; with several processes each gets its share."""
    if cache:
        return CachedLoader(dataset, data_config, batch_size, device, rank=rank, world=world)
    return create_loader(
        dataset, data_config['input_size'], batch_size, is_training=False,
        interpolation=data_config['interpolation'], mean=data_config['mean'], std=data_config['std'],
        crop_pct=data_config['crop_pct'], num_workers=workers, distributed=world > 1, device=device,
        pin_memory=device.type == 'cuda', persistent_workers=False)


def model_data_config(model: nn.Module, img_size: int | None = None) -> dict[str, Any]:
    """How a model wants its images: timm's `resolve_data_config`, with the channels that the model really has.

    Args:
        model: A timm model, possibly made with `in_chans`.
        img_size: Instead of the model's, in pixels.
    """
    channels, *size = get_model_input_config(model)['input_size']
    config = resolve_data_config({'input_size': (channels, *((img_size, img_size) if img_size else size))}, model=model)
    for name in ('mean', 'std'):
        if len(config[name]) != channels:  # as timm's loaders do it
            config[name] = (statistics.mean(config[name]),) * channels
    return config


def open_eval_loader(
        model: nn.Module,
        data: str = '',
        data_dir: str | None = None,
        img_size: int | None = None,
        batch_size: int = 128,
        device: torch.device | str = 'cpu',
        workers: int = 0,
        split: str = 'eval',
        limit: int | None = None,
        labels: bool = True,
) -> Any:
    """Batches for a model in order, without augmentation, prepared as its configuration says.

    Args:
        model: A timm model.
        data: 'folder' or 'digits'; if empty, 'folder' where `data_dir` is given.
        data_dir: See `TrainConfig`.
        img_size: Instead of the model's, in pixels.
        batch_size: Images per batch.
        device: Where the batches go.
        workers: Data loading processes.
        split: 'eval', or 'train' for its images.
        limit: Use only so many images, evenly over the classes.
        labels: Whether they are needed, see `open_dataset`.
    """
    config = model_data_config(model, img_size)
    data = data or ('folder' if data_dir else 'digits')
    dataset = open_dataset(data, data_dir, split, config['input_size'][0], config['input_size'][-1], limit, labels)
    return create_eval_loader(dataset, config, batch_size, torch.device(device), workers)


class CachedLoader:
    """All images of a dataset as one uint8 tensor on the device; crop and flip run there.

    Args:
        dataset: PIL images and targets.
        data_config: Input size, mean and std (timm's names).
        batch_size: Images per batch.
        device: Where the images are kept.
        padding: Zero padding for random crops, in pixels; 0 for none.
        hflip: Probability of a horizontal flip.
        shuffle: Draw a new order each epoch and drop the last incomplete batch.
        rank: This process's number.
        world: Number of processes that share the images.

    Raises:
        LeanError: The images do not fit in memory.
    """

    def __init__(
            self, dataset: Any, data_config: dict[str, Any], batch_size: int, device: torch.device, padding: int = 0,
            hflip: float = 0., shuffle: bool = False, rank: int = 0, world: int = 1,
    ):
        channels, *size = data_config['input_size']
        needed, free = len(dataset) * channels * math.prod(size), _free_memory(device)
        if free is not None and needed > 0.8 * free:
            raise LeanError(f'--cache needs {needed / 2**30:.1f} GiB for {len(dataset)} images; {free / 2**30:.1f} GiB '
                            f'are free on {device}. Drop --cache or use a smaller --img-size.')
        dataset.transform = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), ToNumpy()])
        decoded = [dataset[i] for i in range(len(dataset))]
        self.images = torch.from_numpy(np.stack([image for image, _ in decoded])).to(device)
        self.targets = torch.tensor([target for _, target in decoded], device=device)
        self.mean = torch.tensor(data_config['mean'], device=device).mul(255).view(1, -1, 1, 1)
        self.std = torch.tensor(data_config['std'], device=device).mul(255).view(1, -1, 1, 1)
        self.batch_size, self.padding, self.hflip, self.shuffle = batch_size, padding, hflip, shuffle
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        share = self._share()
        return share // self.batch_size if self.shuffle else math.ceil(share / self.batch_size)

    def _share(self) -> int:
        """Images of this process: equal shares for training, all of them once for evaluation."""
        count = len(self.images)
        return count // self.world if self.shuffle else len(range(self.rank, count, self.world))

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        count, device = len(self.images), self.images.device
        # every process draws the same order, from the CPU generator, so that resuming and sharding agree
        order = torch.randperm(count) if self.shuffle else torch.arange(count)
        order = order[self.rank::self.world][:self._share()].to(device)
        # for the whole epoch, in one copy: a copy in every step would make every step wait for the device
        shifts = torch.randint(0, 2 * self.padding + 1, (len(order), 2)).to(device) if self.padding else None
        flips = (torch.rand(len(order)) < self.hflip).to(device) if self.hflip else None
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            batch = slice(start, start + self.batch_size)
            x = self.images[order[batch]]
            if shifts is not None:
                x = shifted_crop(x, shifts[batch], self.padding)
            if flips is not None:
                x = torch.where(flips[batch, None, None, None], x.flip(-1), x)
            yield (x.float() - self.mean) / self.std, self.targets[order[batch]]


def shifted_crop(x: torch.Tensor, shifts: torch.Tensor, padding: int) -> torch.Tensor:
    """Of each zero-padded image the part at its shift.

    Args:
        x: Images, `[B, C, H, W]`.
        shifts: Rows and columns, `[B, 2]`, from 0 to `2 * padding`; `padding` leaves an image as it is.
        padding: Zeros on every side, in pixels.
    """
    b, c, h, w = x.shape
    padded = F.pad(x, (padding,) * 4)
    rows = shifts[:, :1] + torch.arange(h, device=x.device)  # [B, H]
    cols = shifts[:, 1:] + torch.arange(w, device=x.device)
    index = torch.arange(b, device=x.device)[:, None, None, None], torch.arange(c, device=x.device)[None, :, None, None]
    return padded[index + (rows[:, None, :, None], cols[:, None, None, :])]  # noqa: RUF005 (no star index in 3.10)


def _free_memory(device: torch.device) -> int | None:
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open('/proc/meminfo') as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith('MemAvailable'))
    except (OSError, StopIteration):
        return None


def seed_epoch(seed: int, epoch: int, rank: int = 0) -> None:
    """Seed every generator from the run's seed and the epoch, so that an epoch does not depend on those before it."""
    mixed = seed * 1_000_003 + epoch * 1009 + rank
    random.seed(mixed)
    np.random.seed(mixed % 2 ** 32)
    torch.manual_seed(mixed)
