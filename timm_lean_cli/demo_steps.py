"""The main job in one go on the embedded digits: train, compare, export, reload, draw. Every step is checked."""
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from timm_lean.checkpoint.files import writable_dir
from timm_lean.checkpoint.format import load_model, save_hf_dir, save_model
from timm_lean.errors import LeanError
from timm_lean.measure import ModelReport, format_table, model_reports
from timm_lean.measure.pictures import COLORS, REFERENCE, new_figure, save_figure, style_axes
from timm_lean.sharing.fold import fold
from timm_lean.training import TrainConfig, train
from timm_lean.training.config import load_yaml
from timm_lean.training.data import create_eval_loader, model_data_config, open_dataset

__all__ = ['demo']

_MIN_TOP1 = 90.  # percent; both networks reach more in a few epochs, so less means something broke


def demo(output: Path, epochs: int = 8) -> None:
    """Run the demo; raises a LeanError at the first step that does not do what it should.

    Args:
        output: Folder for checkpoints and the picture; a fresh run folder is made below it each time.
        epochs: Epochs for each of the two networks.
    """
    start = time.perf_counter()
    folder = writable_dir(output) / time.strftime('%Y%m%d-%H%M%S')
    shared_config = replace(
        TrainConfig.from_args(load_yaml('digits_shared')), epochs=epochs, output=str(folder / 'shared'))
    dense_config = replace(shared_config, model_args={}, reg=[], output=str(folder / 'dense'))

    print('1. The dense network: resnet20_cifar on handwritten digits')
    dense = train(dense_config)
    print('\n2. Its shared-basis counterpart: two bases of 16 shared filters per stage, 1 unique per convolution')
    shared = train(shared_config)

    print('\n3. Folded for inference: every shared convolution becomes one dense convolution')
    best = load_model(folder / 'shared' / 'best.safetensors')
    folded = fold(best)
    save_model(folded, folder / 'folded.safetensors')
    print(folded.lean_report)

    print('\n4. Comparison')
    files = [folder / name for name in ('dense/best.safetensors', 'shared/best.safetensors', 'folded.safetensors')]
    reports = model_reports([str(f) for f in files], latency=True)
    for report, name in zip(reports, ('dense', 'shared', 'shared, folded'), strict=True):
        report.name = name
    print(format_table(reports))
    print(f'accuracy: dense {dense["best_top1"]:.2f} %, shared {shared["best_top1"]:.2f} %')
    for name, result in (('dense', dense), ('shared', shared)):
        if result['best_top1'] < _MIN_TOP1:
            raise LeanError(f'The {name} network reached {result["best_top1"]:.2f} %, less than {_MIN_TOP1:.0f} %.')

    print('\n5. Exported, and reloaded through plain timm')
    images, targets = _eval_images(best)
    expected = _logits(best, images)
    save_hf_dir(best, folder / 'hf')
    reloaded = timm.create_model(f'local-dir:{folder / "hf"}', pretrained=True)
    _check_equal("timm.create_model('local-dir:...', pretrained=True)", _logits(reloaded, images), expected, 0.)
    direct = timm.create_model(
        'resnet20_cifar', num_classes=10, shared_rank=16, unique_rank=1, dual=True,
        checkpoint_path=str(folder / 'shared' / 'best.safetensors'))
    _check_equal('timm.create_model(NAME, checkpoint_path=...)', _logits(direct, images), expected, 0.)
    _check_equal('folded checkpoint', _logits(load_model(folder / 'folded.safetensors'), images), expected, 1e-4)

    picture = folder / 'demo.png'
    _draw(picture, images, targets, expected, reports, best)
    print(f'\nDone in {time.perf_counter() - start:.0f} s. Picture: {picture}')


def _eval_images(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """All evaluation images `[N, 3, H, W]` as the model wants them, and their classes `[N]`."""
    config = model_data_config(model)
    dataset = open_dataset('digits', None, 'eval', img_size=config['input_size'][-1])
    loader: DataLoader[Any] = create_eval_loader(dataset, config, len(dataset), torch.device('cpu'), workers=0)
    x, target = next(iter(loader))
    return x, target


@torch.no_grad()
def _logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.eval()(images)


def _check_equal(what: str, logits: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = ((logits - expected).abs().max() / expected.abs().max()).item()
    same = bool((logits.argmax(1) == expected.argmax(1)).all())
    print(f'   {what}: {"identical" if error == 0 else "same"} predictions on {len(expected)} images, '
          f'largest difference {error:.1e} of the largest logit')
    if error > tolerance or not same:
        raise LeanError(f'{what} gives other predictions than the model that was saved (difference {error:.1e}).')


def _draw(
        path: Path, images: torch.Tensor, targets: torch.Tensor, logits: torch.Tensor, reports: list[ModelReport],
        model: nn.Module,
) -> None:
    """A row of digits with their predictions above bars of the comparison."""
    config = model_data_config(model)
    mean, std = (torch.tensor(config[k]).view(-1, 1, 1) for k in ('mean', 'std'))
    figure, _ = new_figure((10, 4.5), rows=0)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.6)).tolist()  # type: ignore[union-attr]
    top.suptitle('Predictions of the reloaded shared-basis network')
    for axes, i in zip(top.subplots(1, 10), range(0, 350, 35), strict=True):
        axes.imshow((images[i] * std + mean).clamp(0, 1).permute(1, 2, 0).numpy())
        prediction = int(logits[i].argmax())
        axes.set_title(str(prediction), color=COLORS[2] if prediction == int(targets[i]) else COLORS[3])
        axes.axis('off')
    values = [
        ('parameters, thousand', [r.params / 1e3 for r in reports]),
        ('file, kB', [r.bytes / 1e3 for r in reports]),
        ('MACs, million', [r.macs / 1e6 for r in reports]),
        ('latency, ms (batch 1)', [r.latency_ms for r in reports]),
    ]
    for axes, (title, heights) in zip(bottom.subplots(1, 4), values, strict=True):
        style_axes(axes)
        axes.bar([r.name for r in reports], heights, color=[REFERENCE, *COLORS[:2]])
        axes.set_title(title)
        axes.tick_params(axis='x', labelrotation=20)
    save_figure(figure, path)
