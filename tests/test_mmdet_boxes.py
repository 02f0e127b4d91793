"""Detectors exported with their selection of boxes, held against MMDetection's own predictions."""
import importlib.util

import pytest
import torch
from mmdet_support import TOOLS, batch, predictions_of, write_native

from timm_lean import LeanError
from timm_lean.mmdet import load_detector, open_detector
from timm_lean.mmdet.boxes import own_boxes, select_boxes, write_boxes
from timm_lean.mmdet.detector import describe, save_detector
from timm_lean.mmdet.export import graph_of
from timm_lean.mmdet.on_images import on_images, prediction_layers
from timm_lean_cli import main

spec = importlib.util.spec_from_file_location('detector_matrix', TOOLS / 'detector_matrix.py')
matrix = importlib.util.module_from_spec(spec)
spec.loader.exec_module(matrix)

KINDS = {name: matrix.DETECTORS[name] for name in (
    'rtmdet_tiny', 'yolox_tiny', 'retinanet_r18', 'fcos_r50', 'atss_r50', 'ssd300', 'centernet_r18')}
KINDS |= {name: f'{name}/{name}_r50_fpn_1x_coco' for name in ('gfl', 'tood')}
REFUSED = {
    'faster_rcnn_r50': 'no detector of one stage', 'deformable_detr_r50': 'no detector of one stage',
    'paa': 'its PAAHead selects boxes in a way of its own', 'yolov3_mobilenetv2': 'torch.export cannot express'}


@torch.no_grad()
def settle_outputs(detector, images):
    """Let every output vary from place to place, as a trained detector's do; random ones are all much alike."""
    layers = [detector.eval().get_submodule(name) for name in prediction_layers(detector, images)]
    seen = {layer: [] for layer in layers}
    hooks = [layer.register_forward_hook(lambda m, _, y: seen[m].append(y.flatten())) for layer in layers]
    with on_images(detector):
        detector(images)
    for hook in hooks:
        hook.remove()
    for layer, outputs in seen.items():
        layer.weight /= torch.cat(outputs).std()
        if layer.bias is not None:
            layer.bias.zero_()
    return detector


@pytest.fixture
def native(tmp_path):
    folder = write_native(tmp_path)
    detector = open_detector(folder / 'zoo.pth', folder / 'config.py')
    return settle_outputs(detector, images_of(detector, 64))


def images_of(detector, side):
    return detector.data_preprocessor(batch(side), training=False)['inputs']


@pytest.mark.parametrize('settings', [
    {}, {'score_thr': 0.8, 'max_per_img': 1000}, {'nms_pre': 7}, {'min_bbox_size': 24, 'max_per_img': 3},
    {'nms': {'type': 'nms', 'iou_threshold': 0.2, 'class_agnostic': True}}], ids=str)
def test_selected_as_mmdetection_selects(native, settings):
    """To the last bit; nothing of MMDetection stays replaced."""
    native.bbox_head.test_cfg.update(settings)
    data = batch(64)
    for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
        found = select_boxes(native, native.data_preprocessor(dict(inputs=[image]))['inputs'])
        expected = predictions_of(native, dict(inputs=[image], data_samples=[sample]))[0].pred_instances
        assert len(expected) > 1
        for name, values in (('boxes', expected.bboxes), ('scores', expected.scores), ('labels', expected.labels)):
            assert torch.equal(found[name], values)


def test_no_box_at_all(native):
    native.bbox_head.test_cfg.score_thr = 1.
    images = images_of(native, 64)
    assert [tuple(x.shape) for x in select_boxes(native, images[:1]).values()] == [(0, 4), (0,), (0,)]
    with pytest.raises(LeanError, match=r'finds no box in the 2 images .*--data-dir'):
        own_boxes('x', native, images)


def test_other_boxes_are_not_written(native, tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime')
    images = images_of(native, 64)
    expected = own_boxes('x', native, images)
    native.bbox_head.test_cfg.nms.iou_threshold = 0.4
    with pytest.raises(LeanError, match=r'The graph finds .* of .* 20 boxes among them; nothing was written'):
        write_boxes(graph_of(native, 'boxes'), images, expected, onnx=tmp_path / 'a.onnx')
    assert not (tmp_path / 'a.onnx').exists()


def test_soft_nms_is_refused(native, tmp_path, capsys):
    pytest.importorskip('onnxruntime')
    file = tmp_path / 'd.safetensors'
    native.cfg.model.test_cfg.nms = {'type': 'soft_nms', 'iou_threshold': 0.5}
    save_detector(native, file, describe(native.cfg, native, {'classes': tuple('0123456789')}))
    assert main(['export', str(file), '--part', 'boxes', '--onnx', str(tmp_path / 'a.onnx'), '--img-size', '64']) == 2
    assert 'its test_cfg has soft_nms where ONNX has plain nms only' in capsys.readouterr().err
    assert not (tmp_path / 'a.onnx').exists()


@pytest.mark.slow
def test_the_files(native, tmp_path, capsys):
    onnxruntime = pytest.importorskip('onnxruntime')
    file, onnx, pt2 = tmp_path / 'd.safetensors', tmp_path / 'a.onnx', tmp_path / 'a.pt2'
    save_detector(native, file, describe(native.cfg, native, {'classes': tuple('0123456789')}))
    assert main(['export', str(file), '--part', 'boxes', '--onnx', str(onnx), '--torch-export', str(pt2),
                 '--img-size', '64', '--device', 'cpu']) == 0
    assert "80 of MMDetection's 80 boxes" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(onnx), providers=['CPUExecutionProvider'])
    assert [o.name for o in session.get_outputs()] == ['boxes', 'scores', 'labels']
    program = torch.export.load(pt2).module()
    model = load_detector(file)
    images = images_of(model, 64)
    for image, sample in zip(images.split(1), predictions_of(model, batch(64)), strict=True):
        expected = sample.pred_instances
        for boxes, scores, labels in (map(torch.from_numpy, session.run(None, {'images': image.numpy()})),
                                      program(image)):
            torch.testing.assert_close(boxes, expected.bboxes, rtol=1e-3, atol=1e-2)
            torch.testing.assert_close(scores, expected.scores, rtol=1e-3, atol=1e-4)
            assert torch.equal(labels, expected.labels)


def detector_of(config, side):
    detector = matrix.new_detector(config)
    images = torch.randn(2, 3, side, side)
    return settle_outputs(detector, images), images


@pytest.mark.slow
@pytest.mark.parametrize('name', KINDS)
def test_kinds(name, tmp_path):
    """Each of MMDetection's own configs, in onnxruntime."""
    pytest.importorskip('onnxruntime')
    detector, images = detector_of(KINDS[name], 320 if name == 'ssd300' else 128)
    expected = own_boxes(name, detector, images)
    form, = write_boxes(graph_of(detector, 'boxes'), images, expected, onnx=tmp_path / 'a.onnx')
    assert sum(len(boxes) for boxes, *_ in expected) > 20
    assert "of MMDetection's" in form.note and (tmp_path / 'a.onnx').is_file()


@pytest.mark.slow
@pytest.mark.parametrize('name', REFUSED)
def test_kinds_that_cannot(name, tmp_path):
    config = matrix.DETECTORS.get(name, f'{name}/{name}_r50_fpn_1x_coco')
    detector = matrix.new_detector(config)
    images = torch.randn(2, 3, 128, 128)
    with pytest.raises(LeanError, match=REFUSED[name]):
        detector = settle_outputs(detector, images) if name == 'yolov3_mobilenetv2' else detector
        write_boxes(graph_of(detector, 'boxes'), images, own_boxes(name, detector, images), onnx=tmp_path / 'a.onnx')
    assert not list(tmp_path.iterdir())
