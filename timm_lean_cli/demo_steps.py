"""A user's story on the embedded digits: train, say how small it shall be, reload. Every step is checked."""
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn as nn

import timm_lean
from timm_lean.checkpoint.files import writable_dir
from timm_lean.checkpoint.format import load_model, save_hf_dir, save_model
from timm_lean.errors import LeanError
from timm_lean.measure import format_table, model_reports
from timm_lean.training import TrainConfig, train
from timm_lean.training.data import open_eval_loader
from timm_lean.training.evaluate import evaluate

__all__ = ['compress_detector', 'demo']

_MIN_TOP1 = 95.  # per cent; a few epochs reach more, so less means something broke
_TARGETS = {'file': 0.25, 'latency': 0.75}
_MAX_DROP = 1.  # points
_MINUTES = 10.  # the search ends by itself much earlier, unless the machine is busy
_DETECTOR_TARGETS = {'file': 0.3}
_DETECTOR_MAX_DROP = 2.  # points of AP
_DETECTOR_MINUTES = 0.5
_DETECTOR_IMAGES = 32  # that calibrate
_TRAINING = TrainConfig(
    model='resnet20_cifar', data='digits', img_size=16, batch_size=64, opt='adamw', lr=3e-3, weight_decay=0.02,
    sched='cosine', warmup_epochs=1, cache=True, channels_last=True)


def demo(output: Path, epochs: int = 8, minutes: float = _MINUTES) -> dict[str, Any]:
    """Run the demo; raises a LeanError at the first step that does not do what it should.

    Args:
        output: Folder for checkpoints and pictures; a fresh run folder is made below it each time.
        epochs: Epochs of training.
        minutes: Time for the search.

    Returns:
        What was found, as JSON data: the run's folder, the training, the search, the networks before and after.
    """
    start = time.perf_counter()
    folder = writable_dir(output) / time.strftime('%Y%m%d-%H%M%S')

    print('1. Your network: resnet20_cifar, trained on handwritten digits')
    result = train(replace(_TRAINING, epochs=epochs, output=str(folder / 'dense')))
    if result['last']['eval_top1'] < _MIN_TOP1:
        raise LeanError(f'The network reached {result["last"]["eval_top1"]:.2f} %, less than {_MIN_TOP1:.0f} %.')
    dense = folder / 'dense' / 'last.safetensors'
    model = load_model(dense)

    print('\n2. Your wish: a quarter of the file, three quarters of the latency, at most one point of accuracy lost. '
          'Nothing is trained;\n   256 images without labels calibrate, other images judge')
    test = list(open_eval_loader(model, 'digits'))
    images = [x for x, _ in open_eval_loader(model, 'digits', split='train', limit=256)]

    def accuracy(network: nn.Module) -> float:
        return evaluate(network, test, torch.device('cpu'))['top1']

    small: Any = timm_lean.compress(
        model, _TARGETS, images, evaluate=accuracy, max_drop=_MAX_DROP, minutes=minutes, folder=folder / 'search',
        nearest=True)
    report = small.lean_report
    _print(report)
    report.plot(folder / 'frontier.png')
    report.write_csv(folder / 'frontier.csv')
    save_model(small, folder / 'small.safetensors', weights=report.weights)

    print('\n3. Before and after')
    reports = model_reports([str(dense), str(folder / 'small.safetensors')], latency=True)
    for each, name in zip(reports, ('your network', 'compressed'), strict=True):
        each.name = name
    print(format_table(reports))

    print('\n4. Exported, and reloaded through plain timm')
    save_hf_dir(small, folder / 'hf')
    reloaded = timm.create_model(f'local-dir:{folder / "hf"}', pretrained=True)
    x = torch.cat([x for x, _ in test])
    with torch.no_grad():
        same = torch.equal(reloaded.eval()(x), small.eval()(x))
    print(f"   timm.create_model('local-dir:...', pretrained=True): {'identical' if same else 'OTHER'} outputs on "
          f'{len(x)} images')
    if not same:
        raise LeanError('The reloaded network gives other outputs than the one that was saved.')
    print(f'\nDone in {time.perf_counter() - start:.0f} s. Picture of all networks that were tried: '
          f'{folder / "frontier.png"}')
    return {'output': str(folder), 'training': result, 'report': report.to_dict(), 'models': list(map(asdict, reports))}


def _print(report: Any) -> None:
    print(report)
    if not report.met:
        print('   No network that was tried is both small and good enough on this machine: this is the nearest.')


def compress_detector(source: Path, minutes: float = _DETECTOR_MINUTES) -> dict[str, Any]:
    """Compress the detector that was trained; raises a LeanError at the first step that does not do what it should.

    Args:
        source: Its exported folder; results lie beside it.
        minutes: Time for the search.

    Returns:
        What was found, as JSON data: the file of the compressed detector, and the search.
    """
    from timm_lean.mmdet import average_precision, calibration_images, load_detector, write_detector
    start = time.perf_counter()
    print('\nYour wish: three tenths of the file, at most two points of AP lost. Nothing is trained')
    folder = source.parent
    detector: Any = load_detector(source)
    score = average_precision(detector)
    if score is None:
        raise LeanError(f'The config of {source} evaluates nothing.')
    small: Any = timm_lean.compress(
        detector, _DETECTOR_TARGETS, calibration_images(detector, _DETECTOR_IMAGES), evaluate=score,
        max_drop=_DETECTOR_MAX_DROP, minutes=minutes, folder=folder / 'search', nearest=True)
    report, file = small.lean_report, folder / 'small.safetensors'
    _print(report)
    report.plot(folder / 'frontier.png')
    write_detector(small, file, weights=report.weights)
    again = score(load_detector(file))
    print(f'   {file}: AP {again:.2f} % when reloaded')
    if abs(again - report.chosen.score) > 1e-6:
        raise LeanError(f'The reloaded detector has AP {again:.2f} %, it had {report.chosen.score:.2f} %.')
    print(f'Done in {time.perf_counter() - start:.0f} s. Picture of all detectors that were tried: '
          f'{folder / "frontier.png"}')
    return {'output': str(file), 'report': report.to_dict()}
