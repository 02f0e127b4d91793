"""ONNX in int8: what is in the file, what it answers, and what is refused."""
import numpy as np
import pytest
import timm
import torch
import torch.nn as nn
from PIL import Image

from timm_lean import LeanError, save_model
from timm_lean.export.int8 import save_onnx_int8
from timm_lean_cli import build_parser, main
from timm_lean_cli.export import _int8_images

onnx = pytest.importorskip('onnx')


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    torch.manual_seed(0)
    model = Net().eval()
    images = torch.randn(96, 3, 8, 8) + torch.randn(96, 3, 1, 1)
    labels = torch.arange(32) % 4
    path = tmp_path_factory.mktemp('int8') / 'm.onnx'
    check = [(images[64:80], labels[:16]), (images[80:], labels[16:])]
    result = save_onnx_int8(model, images[:64].split(20), check, path)
    assert [p.name for p in path.parent.iterdir()] == ['m.onnx']
    return model, images[64:], labels, path, result


def test_the_file_has_int8_weights_by_channel(written):
    *_, path, _ = written
    graph = onnx.load(path).graph
    nodes = {node.op_type for node in graph.node}
    assert {'QuantizeLinear', 'DequantizeLinear'} <= nodes
    weights = {i.name: i for i in graph.initializer}
    conv = next(node for node in graph.node if node.op_type == 'Conv')
    dequantized = next(node for node in graph.node if node.output[0] == conv.input[1])
    values, scales = (onnx.numpy_helper.to_array(weights[name]) for name in dequantized.input[:2])
    assert values.dtype == np.int8 and values.shape == (8, 3, 3, 3) and scales.shape == (8,)


def test_what_it_answers_is_counted(written):
    import onnxruntime
    model, images, labels, path, result = written
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    found = np.concatenate([session.run(None, {'images': part.numpy()})[0] for part in images.split(5)])
    with torch.no_grad():
        wanted = model(images).numpy()
    assert result.images == 32 and result.agree == (found.argmax(1) == wanted.argmax(1)).mean() >= 0.8
    assert result.error == pytest.approx(np.linalg.norm(found - wanted) / np.linalg.norm(wanted), rel=1e-3)
    assert 0 < result.error < 0.1
    assert result.top1 == pytest.approx([100 * (y.argmax(1) == labels.numpy()).mean() for y in (wanted, found)])
    assert '32 images' in str(result) and result.to_dict()['images'] == 32


def test_what_is_refused(tmp_path):
    images = torch.randn(4, 3, 8, 8)
    for calibration, check in (([], [images]), ([images], [])):
        with pytest.raises(LeanError, match='int8 needs images'):
            save_onnx_int8(Net().eval(), calibration, check, tmp_path / 'm.onnx')
    with pytest.raises(LeanError, match='int8 is for classifiers'):
        save_onnx_int8(nn.Conv2d(3, 3, 3).eval(), [images], [images], tmp_path / 'm.onnx')
    assert not list(tmp_path.iterdir())


def test_the_command_needs_images_that_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(timm.create_model('resnet20_cifar', layers=(1, 1, 1)), 'm.safetensors')
    assert main(['export', 'm.safetensors', '--onnx', 'a.onnx', '--int8']) == 2
    err = capsys.readouterr().err
    assert '--data-dir' in err and '--data digits' in err and err.count('\n') == 1
    for folder in ('train', 'val'):
        (tmp_path / 'data' / folder).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'data' / folder / '0.png')
    assert main(['export', 'm.safetensors', '--onnx', 'a.onnx', '--int8', '--data-dir', 'data/val']) == 2
    assert 'data/val needs train/ and val/' in capsys.readouterr().err
    args = build_parser().parse_args(['export', 'm.safetensors', '--data-dir', 'data'])
    ranges, check = _int8_images(args, timm.create_model('resnet20_cifar', layers=(1, 1, 1)), {'data_dir': 'data'})
    assert len(list(ranges)) == 1 and [x.shape for x in check] == [(1, 3, 32, 32)]  # no labels: no accuracy
    assert [p.name for p in tmp_path.glob('*.onnx')] == []


@pytest.mark.slow
def test_the_command_writes_it_beside_the_original(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model(timm.create_model('resnet20_cifar', layers=(1, 1, 1)), 'm.safetensors')
    assert main(['export', 'm.safetensors', '--onnx', 'a.onnx', '--int8', '--data', 'digits', '--device', 'cpu']) == 0
    out = capsys.readouterr().out
    assert 'a.onnx: the class of PyTorch on ' in out and 'top-1' in out and '\na.onnx, int8 ' in out
