"""A detector of one's own on the embedded scenes: train, export, reload, evaluate, draw. Every step is checked."""
import contextlib
import io
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.runner import Runner
from PIL import Image

from timm_lean.checkpoint.files import atomic_file, writable_dir
from timm_lean.errors import LeanError

from .detector import export_detector, load_detector, load_strictly
from .predict import predict_images
from .scenes import write_scenes
from .settings import open_config, set_data_root
from .weights import detector_header

__all__ = ['detection_demo']

CONFIG = Path(__file__).with_name('scenes_config.py')
_MIN_AP50 = 0.5  # training reaches clearly more, so less means something broke
_SHOWN = 6  # scenes in the picture
_CHANNELS = (16, 32, 64, 128)


def detection_demo(output: Path, epochs: int = 10) -> Path:
    """Run the demo; raises a LeanError at the first step that does not do what it should.

    Args:
        output: Folder for data, checkpoints and the picture.
        epochs: Epochs of training; 10 take one to two minutes.

    Returns:
        The folder of the exported detector, in the run's own.
    """
    start = time.perf_counter()
    folder = writable_dir(output) / time.strftime('%Y%m%d-%H%M%S')
    cfg = demo_config(folder, epochs)

    print('1. The data: handwritten digits composed into scenes')
    write_scenes(folder / 'data', cfg.scene_size)
    print(f'   {folder / "data"}')

    print('\n2. RetinaNet with a ResNet-34 of a quarter of the usual width')
    runner = _runner(cfg)
    runner.register_hook(_Progress())
    with _quiet(), _one_thread():
        runner.train()
    best = folder / 'run' / 'best.safetensors'
    header = detector_header(best)

    print('\n3. Exported, reloaded, evaluated again')
    directory = export_detector(None, best, folder / 'detector')
    reloaded: Any = load_detector(directory)
    cfg = demo_config(folder, epochs)
    cfg.work_dir = str(folder / 'test')
    runner = _runner(cfg)
    load_strictly(runner.model, directory / 'model.safetensors')
    with _quiet(), _one_thread():
        metrics = runner.test()
    ap, ap50 = metrics['coco/bbox_mAP'], metrics['coco/bbox_mAP_50']
    size = (directory / 'model.safetensors').stat().st_size
    params = sum(p.numel() for p in reloaded.parameters())
    print(f'   {directory}: {params:,} parameters, {size / 1e6:.1f} MB')
    print(f'   COCO AP {ap:.3f}, AP50 {ap50:.3f}; when it was saved: {header["score"]:.3f}')
    _require(abs(ap - header['score']) < 1e-6, f'the reloaded detector has AP {ap}, it had {header["score"]}')
    _require(ap50 >= _MIN_AP50, f'AP50 is {ap50:.3f}, less than {_MIN_AP50}')

    print('\n4. Predictions')
    images = sorted((folder / 'data' / 'val').glob('*.png'))[:_SHOWN]
    results = predict_images(directory, images, folder / 'pictures', score_thr=0.3)
    _require(any(r['boxes'] for r in results), 'the reloaded detector finds nothing')
    for result in results[:2]:
        boxes = ', '.join(f'{b["class"]} {100 * b["score"]:.0f} %' for b in result['boxes'])
        print(f'   {Path(result["image"]).name}: {boxes}')
    picture = folder / 'detection.png'
    _montage([Path(r['picture']) for r in results], picture)
    print(f'\nDone in {time.perf_counter() - start:.0f} s. Picture: {picture}')
    return directory


def demo_config(folder: Path, epochs: int) -> Config:
    """The scenes config with an ordinary backbone and all its files below one folder."""
    cfg = open_config(CONFIG)
    set_data_root(cfg, folder / 'data')
    cfg.work_dir = str(folder / 'run')
    cfg.log_level = 'ERROR'
    cfg.train_cfg.update(max_epochs=epochs, val_interval=max(epochs // 3, 1))
    backbone = cfg.model.backbone
    backbone.model_name = 'resnet34'
    backbone.model_args = ConfigDict(channels=_CHANNELS, zero_init_last=False)  # update() would keep what was there
    cfg.custom_hooks = [dict(type='timm_lean.SafetensorsHook')]
    cfg.param_scheduler[1].update(end=epochs, T_max=max(epochs - 1, 1))
    return cfg


class _Progress(Hook):
    """One line per epoch and evaluation, on the output as it was when the hook was made."""
    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self.output = sys.stdout

    def print(self, text: str) -> None:
        print(text, file=self.output, flush=True)

    def after_train_epoch(self, runner: Any) -> None:
        terms = {name: runner.message_hub.get_scalar(f'train/{name}').mean(20)
                 for name in ('loss', 'loss_cls', 'loss_bbox')}
        shown = '  '.join(f'{name} {value:.4f}' for name, value in terms.items())
        self.print(f'   epoch {runner.epoch + 1}/{runner.max_epochs}  {shown}')

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        metrics = metrics or {}
        self.print(f'   AP {metrics.get("coco/bbox_mAP", 0):.3f}  AP50 {metrics.get("coco/bbox_mAP_50", 0):.3f}')


def _runner(cfg: Config) -> Runner:
    with _quiet():
        return Runner.from_cfg(cfg)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the tables that pycocotools prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread: so small a network gains little from more, and loses much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise LeanError(f'Detection demo: {message}.')


def _montage(pictures: Sequence[Path], path: Path) -> None:
    """Pictures of one size side by side in two rows, doubled."""
    images = [np.asarray(Image.open(p).convert('RGB')) for p in pictures]
    half = (len(images) + 1) // 2
    images += [np.zeros_like(images[0])] * (2 * half - len(images))
    grid = np.concatenate([np.concatenate(images[:half], 1), np.concatenate(images[half:], 1)])
    image = Image.fromarray(grid)
    with atomic_file(path) as temporary:
        image.resize((2 * image.width, 2 * image.height), Image.Resampling.LANCZOS).save(temporary, format='PNG')
