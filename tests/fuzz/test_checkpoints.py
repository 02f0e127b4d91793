"""Damaged classification files give one CheckpointError or a model, fast and in little memory."""
import resource

import pytest
import timm
import torch.nn as nn

from fuzz import fuzz
from fuzz.safetensors_file import mutate_file
from timm_lean import CheckpointError, fold, load_model, save_model


@pytest.mark.timeout(0)
@pytest.mark.parametrize('kind', ['dense', 'folded'])
def test_mutated_files(kind, tmp_path):
    model = timm.create_model('resnet20_cifar')
    if kind == 'folded':
        model = fold(timm.create_model('resnet20_cifar', shared_rank=2, unique_rank=1).eval())
    path = tmp_path / 'm.safetensors'
    save_model(model, path)
    data = path.read_bytes()
    load_model(path)

    def attempt(rng):
        path.write_bytes(mutate_file(rng, data))
        assert isinstance(load_model(path), nn.Module)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = fuzz(attempt, count=60, allowed=CheckpointError)
    assert outcome['refused'] > outcome['accepted'], outcome
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB
