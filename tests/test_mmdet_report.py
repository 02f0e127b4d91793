"""What a detector costs, against counts made by hand and by the tensors themselves."""
import pytest
import torch
from mmdet_support import DENSE, scenes_config
from safetensors import safe_open

from timm_lean import CheckpointError
from timm_lean.mmdet.detector import build_detector, describe, save_detector
from timm_lean.mmdet.report import detector_report


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp('report')
    cfg = scenes_config(folder, DENSE)
    model = build_detector(cfg)
    path = folder / 'detector.safetensors'
    save_detector(model, path, describe(cfg, model, dict(classes=tuple('0123456789'))))
    return path, model


def test_parameters_file_and_size(saved):
    path, model = saved
    report = detector_report(path)
    with safe_open(path, 'pt') as f:
        stored = {k: f.get_tensor(k).numel() for k in f.keys()}  # noqa: SIM118
    parameters = {name for name, _ in model.named_parameters()}
    assert report.params == sum(n for name, n in stored.items() if name in parameters)
    assert (report.name, report.bytes, report.img_size) == (str(path), path.stat().st_size, 64)
    assert report.latency_ms is None


def test_macs_of_neck_and_head_by_hand(saved):
    """The FPN and the head of 64 channels at 64 x 64 pixels: levels of 8 x 8, 4 x 4 and 2 x 2."""
    path, model = saved
    total = detector_report(path, img_size=64).macs
    backbone = 0

    def count(module, args, output):
        nonlocal backbone
        if isinstance(module, torch.nn.Conv2d):
            backbone += output.numel() * module.weight[0].numel()
        else:
            backbone += 2 * output.numel()

    handles = [m.register_forward_hook(count) for m in model.backbone.modules()
               if isinstance(m, (torch.nn.Conv2d, torch.nn.BatchNorm2d))]
    with torch.no_grad():
        model.backbone.eval()(torch.zeros(1, 3, 64, 64))
    for handle in handles:
        handle.remove()
    pixels = [64, 16, 4]
    neck = sum(n * 64 * (c + 9 * 64) for n, c in zip(pixels, (16, 24, 32), strict=True))
    head = model.bbox_head
    convolutions = 9 * 64 * 64 * 2 * head.stacked_convs
    outputs = 9 * 64 * head.num_base_priors * (10 + 4)
    assert total == backbone + neck + sum(pixels) * (convolutions + outputs)


def test_latency(saved):
    report = detector_report(saved[0], latency=True, repeats=3)
    assert report.latency_ms > 0 and report.peak_memory > 0 and report.device == 'cpu'


def test_not_a_detector(tmp_path):
    with pytest.raises(CheckpointError):
        detector_report(tmp_path)
