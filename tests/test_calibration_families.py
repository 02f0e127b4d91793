"""Slow: calibrated networks of many timm families are never further from the original than uncalibrated ones."""
import pytest
import timm
import torch
import torch.nn as nn
from conftest import randomize_batchnorm

from timm_lean import LeanError, share
from timm_lean.calibration import calibrate
from timm_lean.pruning import prune_channels, prune_kernels, remove_blocks

pytestmark = pytest.mark.slow

FAMILIES = [
    'resnet20_cifar', 'resnet10t', 'resnet26d', 'resnext26ts', 'seresnext26d_32x4d', 'res2net50_26w_4s',
    'regnetx_002', 'regnety_002', 'mobilenetv2_035', 'mobilenetv3_small_050', 'efficientnet_lite0', 'mnasnet_small',
    'ghostnet_050', 'densenet121', 'vgg11_bn', 'darknet17', 'cspresnet50', 'dla34', 'hrnet_w18_small', 'convnext_atto',
    'mixnet_s', 'rexnet_100', 'repvgg_a0', 'hardcorenas_a', 'selecsls42', 'fbnetc_100', 'spnasnet_100', 'tinynet_e',
    'mobileone_s0', 'lcnet_050', 'semnasnet_050']


def squared(model, original, x):
    with torch.no_grad():
        y = original(x)
        return float((model(x) - y).square().sum() / y.square().sum())


@pytest.mark.parametrize('technique', ['kernels', 'channels', 'share', 'blocks'])
@pytest.mark.parametrize('name', FAMILIES)
def test_never_worse(name, technique):
    torch.manual_seed(0)
    original = randomize_batchnorm(timm.create_model(name, num_classes=10)).eval()
    x = nn.functional.interpolate(torch.randn(12, 3, 8, 8), size=64, mode='bilinear')
    compress = {
        'kernels': lambda: prune_kernels(original, amount=0.4),
        'channels': lambda: prune_channels(original, x[:1], pruning_ratio=0.25, round_to=1),
        'share': lambda: share(original, shared_rank=16),
        'blocks': lambda: remove_blocks(original, count=1, calibration=[x])}
    try:
        model = compress[technique]()
    except LeanError as e:
        pytest.skip(str(e)[:200])
    if technique == 'blocks':
        block = model.lean_report.removed[0][0]
        new, model = model, remove_blocks(original, blocks=[block])
    else:
        new = calibrate(model, original, [x], kept=getattr(model.lean_report, 'kept', None))
    held = x[3::4]
    assert squared(new, original, held) <= squared(model, original, held) * (1 + 1e-4) + 1e-10
