"""What a detector costs: parameters, multiply-accumulates, file, latency.

Multiply-accumulates are of the forward pass alone, as MMDetection's `get_flops.py` counts them; in a two-stage detector
those of the second stage depend on how many boxes the first one proposes. Latency is of a whole prediction, boxes
selected.
"""
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from timm_lean.measure import count_macs, count_params, inference, measure_latency, peak_memory
from timm_lean.measure.report import ModelReport

from .data import datasets
from .detector import WEIGHTS_FILE, load_detector
from .on_images import image_samples

__all__ = ['OnImages', 'detector_macs', 'detector_report', 'test_size']

_IMG_SIZE = 640  # of detectors whose config does not say
_DIVISOR = 32  # the coarsest level of most detectors


def detector_report(
        source: str | Path, *, device: torch.device | str = 'cpu', latency: bool = False, img_size: int | None = None,
        repeats: int = 20, trust_imports: Sequence[str] = (),
) -> ModelReport:
    """Measure a detector.

    Args:
        source: What `load_detector` takes.
        device: Where to run it.
        latency: Also time it, and measure its memory.
        img_size: Side of the square image; if None the shorter side that the detector is tested with, rounded up to a
            multiple of 32.
        repeats: Timed predictions.
        trust_imports: See `load_detector`.

    Raises:
        CheckpointError: The source is no detector that can be loaded.
    """
    detector: Any = load_detector(source, trust_imports=trust_imports)
    side = img_size or test_size(detector.cfg)
    weights = Path(source) / WEIGHTS_FILE if Path(source).is_dir() else Path(source)
    shape = (1, 3, side, side)
    report = ModelReport(
        str(source), count_params(detector), detector_macs(detector, side), weights.stat().st_size,
        side)
    if latency:
        place, model = torch.device(device), OnImages(detector, 'predict')
        timing, = measure_latency([model], [shape], place, repeats)
        report.latency_ms, report.latency_spread_ms = 1000 * timing.median, 1000 * timing.spread
        report.peak_memory = peak_memory(inference(model, torch.randn(*shape, device=place)), place)
        report.device = str(device)
    return report


def detector_macs(detector: Any, side: int | None = None) -> int:
    """Multiply-accumulates of a forward pass of one image; `side` in pixels, that of the config's test if None."""
    side = side or test_size(detector.cfg)
    return count_macs(OnImages(detector, 'tensor'), (1, 3, side, side))


class OnImages(nn.Module):
    """A detector as a function of images `[B, 3, H, W]` alone."""

    def __init__(self, detector: nn.Module, mode: str):
        super().__init__()
        self.detector, self.mode = detector, mode
        self.training = detector.training  # whoever puts the whole back into its mode puts back the detector's

    def forward(self, x: torch.Tensor) -> Any:
        return self.detector(x, image_samples(x), mode=self.mode)


def test_size(cfg: Any) -> int:
    """The shorter side of the images that a config's detector is tested with, rounded up to a multiple of 32."""
    tested = [dataset['pipeline'] for dataset in datasets((cfg.get('test_dataloader') or {}).get('dataset'))]
    scales = [step['scale'] for step in (tested or [()])[0] if step.get('scale')]
    side = min(scales[0]) if scales and isinstance(scales[0], (list, tuple)) else _IMG_SIZE
    return -(-side // _DIVISOR) * _DIVISOR
