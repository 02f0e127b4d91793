"""`round_weights`: what a file in int8 holds, with biases that make up for what rounding moves."""
import numpy as np
import pytest
import timm
import torch
import torch.nn as nn

from timm_lean import calibrate, load_model, prune_kernels, save_model, share
from timm_lean.export.rounding import round_weights

from conftest import randomize_batchnorm  # isort: skip


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    return randomize_batchnorm(
        timm.create_model('lean_resnet', layers=(1, 1), widths=(8, 16), num_classes=4)).eval()


@pytest.fixture(scope='module')
def images():
    return list(1 + torch.randn(2, 16, 3, 16, 16, generator=torch.Generator().manual_seed(1)))  # a mean moves outputs


@pytest.mark.parametrize('change', [
    lambda m: m, lambda m: share(m, params=0.8), lambda m: prune_kernels(m, amount=0.5)], ids=['', 'shared', 'pruned'])
def test_it_is_stored_in_int8_without_further_loss(model, images, change, tmp_path):
    new = round_weights(change(model), calibration=images)
    save_model(new, tmp_path / 'm.safetensors', weights='int8')
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / 'm.safetensors')(images[0]), new(images[0]))
    before, after = new.lean_report.output_error
    assert after <= before and f'{100 * after:.3f} %' in str(new.lean_report)


def test_only_biases_and_statistics_change(model, images):
    plain, repaired = round_weights(model), round_weights(model, calibration=images)
    changed = {name for (name, a), b in zip(plain.state_dict().items(), repaired.state_dict().values(), strict=True)
               if not torch.equal(a, b)}
    assert changed and all(name.endswith(('bias', 'running_mean', 'running_var')) for name in changed)
    assert plain.lean_report.output_error is None


def test_a_bias_takes_back_the_mean_that_rounding_moves():
    """A linear layer by hand: least squares with a free bias alone is the mean of what lacks, here by numpy."""
    torch.manual_seed(0)
    original = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(1)).eval()
    coarse = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Flatten(1)).eval()
    with torch.no_grad():
        coarse[0].weight.copy_((4 * original[0].weight).round() / 4)
        coarse[0].bias.copy_(original[0].bias)
    x = 2 + torch.randn(64, 3, 1, 1)
    new = calibrate(coarse, original, [x], biases_only=True, ridge=0.)
    assert torch.equal(new[0].weight, coarse[0].weight)
    fitted = torch.tensor([i % 4 != 3 for i in range(64)])  # a quarter is held out
    lacking = (original(x) - coarse(x))[fitted].detach().numpy()
    moved = (new[0].bias - coarse[0].bias).detach().numpy()
    some = np.abs(moved) > 0  # a bias is left alone where that does not help the images that were held out
    assert some.any()
    np.testing.assert_allclose(moved[some], lacking.mean(0)[some], rtol=0.05)
