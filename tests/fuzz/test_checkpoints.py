"""Damaged classification files give one CheckpointError or a usable model, fast and in little memory."""
import resource
from pathlib import Path

import pytest
import torch.nn as nn
from timm.data import create_transform, resolve_model_data_config

from fuzz import fuzz
from fuzz.safetensors_file import mutate_file
from timm_lean import CheckpointError, load_model

FILES = sorted(f for f in (Path(__file__).parents[1] / 'formats').glob('*/*.safetensors') if f.stem != 'detector')


@pytest.mark.timeout(0)
@pytest.mark.parametrize('file', FILES, ids=lambda file: file.stem)
def test_mutated_files(file, tmp_path):
    data, path = file.read_bytes(), tmp_path / 'm.safetensors'
    load_model(file)

    def attempt(rng):
        path.write_bytes(mutate_file(rng, data))
        model = load_model(path)
        assert isinstance(model, nn.Module)
        create_transform(**resolve_model_data_config(model))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = fuzz(attempt, count=15, allowed=CheckpointError)
    assert outcome['refused'] > outcome['accepted'] / 2, outcome
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
