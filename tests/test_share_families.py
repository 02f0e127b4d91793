"""Families of timm's CNNs convert, train a step, save and come back."""
import pytest
import timm
import torch
from conftest import randomize_batchnorm
from timm.models import get_model_input_config

from timm_lean import LeanError, load_model, save_model, share

FAMILIES = [
    'resnet18', 'resnet50', 'resnetv2_18', 'seresnet18', 'ecaresnet26t', 'skresnet18', 'vgg11_bn', 'vgg11',
    'densenet121', 'dla34', 'hrnet_w18_small', 'cspresnet50', 'cspdarknet53', 'darknet53', 'repvgg_a0', 'vovnet39a',
    'ese_vovnet19b_slim', 'selecsls42b', 'inception_v3', 'inception_v4', 'inception_resnet_v2', 'efficientnet_es',
    'gernet_s', 'hgnet_tiny', 'hgnetv2_b0', 'resnet20_cifar', 'legacy_seresnet18',
]
NOTHING_TO_SHARE = ['hardcorenas_a', 'fbnetc_100', 'mobilenetv2_100', 'regnetx_002', 'convnext_atto', 'resnext50_32x4d']
"""Only 1 x 1, grouped and depthwise convolutions, or no two of one shape in a stage."""


@pytest.mark.slow
@pytest.mark.parametrize('name', NOTHING_TO_SHARE)
def test_nothing_to_share(name):
    with pytest.raises(LeanError, match='nothing to share'):
        share(timm.create_model(name, num_classes=3).eval(), shared_rank=4)


@pytest.mark.slow
@pytest.mark.parametrize('name', FAMILIES)
def test_family(name, tmp_path):
    torch.manual_seed(0)
    model = randomize_batchnorm(timm.create_model(name, num_classes=3)).eval()
    size = min(get_model_input_config(model)['input_size'][1], 128)
    x = torch.randn(2, 3, size, size)
    full = share(model, energy=1.0)
    with torch.no_grad():
        assert float((full(x) - model(x)).norm() / model(x).norm()) < 1e-4
    del full
    new = share(model, energy=0.7, unique_rank=1).train()
    optimizer = torch.optim.SGD(new.parameters(), lr=1e-3)
    outputs = new(x)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    outputs.square().mean().backward()
    optimizer.step()
    new.eval()
    save_model(new, tmp_path / 'm.safetensors')
    again = load_model(tmp_path / 'm.safetensors').eval()
    with torch.no_grad():
        assert torch.equal(again(x), new(x))
