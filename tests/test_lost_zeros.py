"""A pruned model that has lost some of its zero kernels is saved with a warning that says how many."""
import logging

import pytest
import timm
import torch

from timm_lean import compact, load_model, prune_kernels, save_model
from timm_lean.checkpoint.recipe import lost_zeros, zero_kernels


def pruned():
    torch.manual_seed(0)
    model = timm.create_model('resnet20_cifar', layers=(1, 1, 1), num_classes=4)
    return prune_kernels(model, criterion='weight', amount=0.5)


def revive(model, share):
    """Give this share of all zero kernels a value, layer after layer."""
    count = round(share * zero_kernels(model))
    for name, weight in model.named_parameters():
        if weight.ndim == 4 and name.endswith('weight'):
            for o, c in (weight == 0).flatten(2).all(2).nonzero()[:count].tolist():
                weight.data[o, c, 0, 0] = 1e-3
                count -= 1
    assert count == 0


@pytest.mark.parametrize('loaded', [False, True], ids=['pruned', 'loaded'])
@pytest.mark.parametrize('share', [0., 0.25, 1.])
def test_the_share_that_is_lost_is_told(tmp_path, caplog, share, loaded):
    model = pruned()
    if loaded:
        save_model(model, tmp_path / 'a.safetensors')
        model = load_model(tmp_path / 'a.safetensors')
    revive(model, share)
    assert lost_zeros(model) == pytest.approx(share, abs=1e-3)
    with caplog.at_level(logging.WARNING):
        save_model(model, tmp_path / 'b.safetensors')
    messages = [r.getMessage() for r in caplog.records]
    assert [m.split(' of ')[0] for m in messages] == ([] if share == 0 else [f'{100 * share:.0f} %']), messages
    assert all('keep_zeros' in m for m in messages)


def test_channels_removed_with_their_zeros_are_no_loss(tmp_path, caplog):
    model = prune_kernels(timm.create_model('resnet20_cifar', layers=(1, 1, 1)), criterion='weight', amount=0.9).eval()
    small = compact(model, torch.randn(1, 3, 16, 16))
    assert 0 < zero_kernels(small) < zero_kernels(model)
    save_model(small, tmp_path / 'm.safetensors')
    assert 'not zero any more' not in caplog.text
