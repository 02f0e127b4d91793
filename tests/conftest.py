"""Shared by all tests: one compute thread per process (pytest-xdist runs several), fixed seeds, no stray files."""
import random

import numpy as np
import pytest
import torch

import timm_lean  # noqa: F401  (registers the models)


@pytest.fixture(autouse=True)
def _deterministic():
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=['cpu', pytest.param('cuda', marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason='no GPU'))])
def device(request):
    """Every device there is; `tools/prove_gpu.py` runs the tests that take it."""
    return torch.device(request.param)


def randomize_batchnorm(model: torch.nn.Module) -> torch.nn.Module:
    """Give every BN statistics and affine parameters a trained network could have; fresh ones hide errors."""
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
            with torch.no_grad():
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0, 0.1)
    return model
