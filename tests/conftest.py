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
def device(request, monkeypatch):
    """Every device there is, in full precision. `tools/prove_gpu.py` runs the tests that take it."""
    if request.param == 'cuda':  # by default convolutions round float32 to TF32's 10 bits
        monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
        monkeypatch.setattr(torch.backends.cuda.matmul, 'allow_tf32', False)
    return torch.device(request.param)


# a small network of every family, for 32 pixels
FAMILIES = {
    'resnet20_cifar': dict(layers=(1, 1, 1)), 'resnet32_cifar_s8u1': dict(layers=(2, 2, 2)),
    'resnet34_s32u1_dual': dict(layers=(2, 2, 2, 2)), 'resnet50_sharedpp': dict(layers=(2, 2, 2, 2)),
    'mobilenetv2_100_sharedpp': {}, 'densenet121_cifar_s64u4': dict(layers=(2, 2, 2, 2)),
    'resnext50_cifar_s16u1': dict(layers=(2, 2, 2, 2)), 'mobilenetv2_cifar_sharedpp': {},
    'lean_resnet': dict(layers=(1, 1, 1)), 'lean_resnext': dict(layers=(1, 1, 1)),
    'lean_shared_resnet': dict(layers=(2, 2, 2)), 'lean_densenet': dict(layers=(2, 2, 2)),
    'lean_efficientnet': dict(layers=(1, 1, 1))}

SOME_FAMILIES = [pytest.param(name, marks=pytest.mark.slow if i % 3 else ()) for i, name in enumerate(FAMILIES)]
"""Every third in the fast set."""


def pytest_collection_modifyitems(items):
    """`-m device` chooses the tests that run on every device there is."""
    for item in items:
        if 'device' in getattr(item, 'fixturenames', ()):
            item.add_marker('device')


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


def shorten_searches(monkeypatch, mixes, steps):
    """Let `compress` make few candidates and calibrate none: for tests that are about the search."""
    from timm_lean.search.plan import Plan
    make = Plan.make
    monkeypatch.setattr('timm_lean.search.search._MOST_MIXES', mixes)
    monkeypatch.setattr('timm_lean.search.space._STEPS', steps)
    monkeypatch.setattr(Plan, 'make', lambda self, model, subject, images=None: make(self, model, subject))


def by_params(model):
    """An accuracy that only parameters decide, for which the largest network within a limit is the best."""
    return 100 * sum(p.numel() for p in model.parameters()) / 1e6
