"""`timm-lean export` of detectors: the whole as a folder, the backbone as ONNX and torch.export files."""
import json

import numpy as np
import pytest
import torch
from mmdet_support import SHARED, batch, predictions_of, scenes_config, write_native

from timm_lean.mmdet import load_detector
from timm_lean.mmdet.detector import build_detector, describe, save_detector
from timm_lean.pruning import prune_kernels
from timm_lean_cli import main

from conftest import randomize_batchnorm  # isort: skip


@pytest.fixture(scope='module')
def detector(tmp_path_factory):
    folder = tmp_path_factory.mktemp('export')
    cfg = scenes_config(folder, SHARED)
    torch.manual_seed(0)
    model = randomize_batchnorm(build_detector(cfg))
    model.backbone.net = prune_kernels(model.backbone.net, criterion='spectral_norm', amount=0.3)
    path = folder / 'det.safetensors'
    save_detector(model, path, describe(cfg, model, {'classes': [str(i) for i in range(10)]}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize('fold', [pytest.param([], id='shared'), pytest.param(['--fold'], id='folded')])
def test_backbone_as_onnx_and_pt2(detector, tmp_path, capsys, fold):
    onnxruntime = pytest.importorskip('onnxruntime')
    onnx, pt2 = tmp_path / 'b.onnx', tmp_path / 'b.pt2'
    assert main(['export', str(detector), '--part', 'backbone', '--onnx', str(onnx), '--torch-export', str(pt2),
                 '--img-size', '64', '--device', 'cpu', *fold]) == 0
    out = capsys.readouterr().out
    assert 'level_0: stride 8, 16 channels' in out and out.count('of PyTorch on 8 images') == 2
    session = onnxruntime.InferenceSession(str(onnx), providers=['CPUExecutionProvider'])
    assert [o.name for o in session.get_outputs()] == ['level_0', 'level_1', 'level_2']
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = load_detector(detector).backbone(x)
    actual = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    again = torch.export.load(pt2).module()(x)
    for e, a, b in zip(expected, actual, again, strict=True):
        np.testing.assert_allclose(a, e.numpy(), rtol=1e-3, atol=1e-3 * float(e.abs().max()))
        torch.testing.assert_close(b, e, rtol=1e-3, atol=1e-3 * float(e.abs().max()))


@pytest.mark.slow
def test_the_whole_as_onnx(detector, tmp_path, capsys):
    """All that the head gives before boxes are selected."""
    onnxruntime = pytest.importorskip('onnxruntime')
    assert main(['export', str(detector), '--onnx', str(tmp_path / 'w.onnx'), '--img-size', '64',
                 '--device', 'cpu']) == 0
    model = load_detector(detector)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        outputs = model.bbox_head(model.extract_feat(x))
    expected = {f'head_{i}_level_{j}': level for i, kind in enumerate(outputs) for j, level in enumerate(kind)}
    session = onnxruntime.InferenceSession(str(tmp_path / 'w.onnx'), providers=['CPUExecutionProvider'])
    assert [o.name for o in session.get_outputs()] == list(expected)
    for actual, e in zip(session.run(None, {'images': x.numpy()}), expected.values(), strict=True):
        np.testing.assert_allclose(actual, e.numpy(), rtol=1e-3, atol=1e-3 * float(e.abs().max()))
    assert 'head_0_level_0: stride 8' in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_as_a_folder(detector, tmp_path, capsys):
    assert main(['export', str(detector), '--det-dir', str(tmp_path / 'd')]) == 0
    assert 'load_detector' in capsys.readouterr().out
    for a, b in zip(predictions_of(load_detector(detector), batch(64)),
                    predictions_of(load_detector(tmp_path / 'd'), batch(64)), strict=True):
        assert torch.equal(a.pred_instances.scores, b.pred_instances.scores)


def test_int8_is_calibrated_by_the_configs_images_where_they_are(tmp_path, capsys, monkeypatch):
    from timm_lean.export import rounding
    counts, whole = [], rounding.round_weights

    def round_weights(model, *, calibration=None):
        counts.append(sum(map(len, calibration.batches)))
        return whole(model)
    monkeypatch.setattr(rounding, 'round_weights', round_weights)
    monkeypatch.chdir(tmp_path)
    write_native(tmp_path)
    common = ['export', 'zoo.pth', '--det-config', 'config.py', '--det-dir', 'd', '--weights', 'int8']
    assert main([*common, '--calibrate', '4', '--data-root', 'other']) == 0 and counts == [4]
    assert 'weights rounded to int8' in capsys.readouterr().out
    assert load_detector('d').cfg.train_dataloader.dataset.data_root == 'other/'
    assert main([*common, '--calibrate', '0']) == 0 and counts == [4]
    with open('config.py', 'a') as f:
        f.write('train_dataloader = None\n')
    assert main(common) == 0 and counts == [4]
    assert 'not calibrated: The config has no train_dataloader' in capsys.readouterr().err
    assert main([*common, '--calibrate', '8']) == 2


def test_info_says_what_a_detector_costs(detector, capsys):
    assert main(['info', str(detector), '--img-size', '64', '--device', 'cpu', '--latency', '--json']) == 0
    report, = json.loads(capsys.readouterr().out)
    model = load_detector(detector)
    assert report['params'] == sum(p.numel() for p in model.parameters())
    assert report['bytes'] == detector.stat().st_size and report['img_size'] == 64 and report['macs'] > 0
    assert report['latency_ms'] > 0 and report['peak_memory'] > 0
    assert main(['info', str(detector), '--data', 'digits', '--device', 'cpu']) == 2
    assert 'is a detector' in capsys.readouterr().err


@pytest.mark.parametrize('options, message', [
    ([], 'is a detector: give --det-dir DIR'),
    (['-o', 'x.safetensors'], 'are for classification'),
    (['--det-dir', 'x', '--calibrate', '8'], '--weights int8'),
    (['--onnx', 'x.onnx', '--data-root', '.'], '--weights int8'),
    (['--hf-dir', 'x'], 'are for classification'),
    (['--det-dir', 'x', '--fold'], '--fold is for --onnx'),
    (['--onnx', 'x.pt'], '.onnx'),
    (['--torch-export', 'x.pt2', '--data-dir', '.'], 'has 0 images'),
])
def test_errors(detector, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(['export', str(detector), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
