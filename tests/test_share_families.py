"""Families of timm's CNNs convert to a budget, are calibrated, train, save, come back, fold and leave as ONNX."""
import numpy as np
import pytest
import timm
import torch
from conftest import randomize_batchnorm
from timm.models import get_model_input_config

from timm_lean import fold, load_model, save_model, share
from timm_lean.export.forms import save_onnx

FAMILIES = [
    'convnext_atto', 'convnextv2_atto', 'cs3darknet_focus_s', 'dla46_c', 'edgenext_xx_small', 'efficientnet_es',
    'efficientvit_b0', 'efficientvit_m0', 'ese_vovnet19b_slim', 'fasternet_t0', 'fastvit_t8', 'fbnetc_100',
    'gcresnext26ts', 'gernet_s', 'ghostnet_050', 'ghostnetv3_050', 'hardcorenas_a', 'hgnetv2_b0',
    'inception_next_atto', 'lcnet_035', 'mixnet_s', 'mnasnet_small', 'mobilenetv2_035', 'mobilenetv3_small_050',
    'mobilenetv4_conv_small_035', 'mobileone_s0', 'mobilevit_xxs', 'mobilevitv2_050', 'nf_regnet_b0', 'pvt_v2_b0',
    'regnetx_002', 'regnety_002', 'regnetz_005', 'repghostnet_050', 'repvgg_a0', 'repvit_m0_9', 'resnet20_cifar',
    'rexnet_100', 'semnasnet_075', 'shvit_s1', 'spnasnet_100', 'starnet_s050', 'swiftformer_xs', 'test_byobnet',
    'test_convnext', 'test_mambaout', 'test_nfnet', 'tf_efficientnetv2_b0', 'tf_mobilenetv3_small_minimal_100',
    'tinynet_e',
]
WIDTHS = (16, 32, 64, 128)
NARROW = {
    'densenet121': dict(growth_rate=8), 'ecaresnet26t': dict(channels=WIDTHS), 'resnet18': dict(channels=WIDTHS),
    'resnetv2_18': dict(channels=WIDTHS), 'resnext50_32x4d': dict(channels=WIDTHS, base_width=16),
    'seresnet18': dict(channels=WIDTHS), 'skresnet18': dict(channels=WIDTHS)}
"""Families whose smallest member is wide: the equations of a calibration grow with the cube of the width."""


@pytest.mark.slow
@pytest.mark.parametrize('name', [*FAMILIES, *NARROW])
def test_family(name, tmp_path):
    import onnxruntime
    torch.manual_seed(0)
    model = randomize_batchnorm(timm.create_model(name, num_classes=10, **NARROW.get(name, {}))).eval()
    size = min(get_model_input_config(model)['input_size'][1], 64)
    x = torch.randn(8, 3, size, size)
    new = share(model, params=0.6, calibration=[x])
    before, after = new.lean_report.params
    assert abs(after / before - 0.6) <= 0.03
    new.train()
    outputs = new(x)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    outputs.square().mean().backward()
    torch.nn.utils.clip_grad_norm_(new.parameters(), 1)  # maps of one pixel: a batch norm sees eight values
    torch.optim.SGD([p for p in new.parameters() if p.grad is not None], lr=1e-4).step()
    new.eval()
    x = x[:2]
    save_model(new, tmp_path / 'm.safetensors')
    with torch.no_grad():
        y = new(x)
        assert torch.isfinite(y).all()
        assert torch.equal(load_model(tmp_path / 'm.safetensors').eval()(x), y)
        folded = fold(new)
        assert float((folded(x) - y).norm() / y.norm()) < 1e-4
    save_onnx(new, x, tmp_path / 'm.onnx')
    session = onnxruntime.InferenceSession(str(tmp_path / 'm.onnx'), providers=['CPUExecutionProvider'])
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(got, y.numpy(), atol=1e-3 * float(y.abs().max()))
