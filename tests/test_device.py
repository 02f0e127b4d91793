"""What runs on a device, against the values of the CPU in double precision. `tools/prove_gpu.py` runs it on a GPU."""
import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import FAMILIES, SOME_FAMILIES, randomize_batchnorm
from torch.testing import assert_close

from timm_lean.calibration import calibrate
from timm_lean.pruning import KernelPruner, all_scores, prune_kernels
from timm_lean.regularizers import create_regularizer, list_regularizers


def small():
    return timm.create_model('resnet32_cifar_s8u1', layers=(2, 1, 1), channels=(8, 8, 8), shared_rank=4)


@pytest.mark.parametrize('name', SOME_FAMILIES)
def test_outputs_and_gradients_of_every_family(name, device):
    """In eval mode, where batch norms do not amplify rounding."""
    torch.manual_seed(0)
    model, x = timm.create_model(name, **FAMILIES[name]), torch.randn(2, 3, 32, 32)
    randomize_batchnorm(model).eval()
    found = []
    for where, dtype in ((device, torch.float32), ('cpu', torch.float64)):
        network = copy.deepcopy(model).to(where, dtype)
        out = network(x.to(where, dtype))
        F.cross_entropy(out, torch.arange(2, device=where)).backward()
        found.append([out.detach().cpu().float(), *(p.grad.cpu().float() for p in network.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 5e-3 * b.norm() + 1e-7


def test_loss_and_gradients_of_every_regularizer(device):
    x, target = torch.randn(4, 3, 16, 16), torch.arange(4)
    found = []
    for where, dtype in ((device, torch.float32), ('cpu', torch.float64)):
        torch.manual_seed(0)
        model = small()
        with torch.no_grad():  # away from orthogonal bases, where the spectral norm of `B B^T - I` has no gradient
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        model.to(where, dtype)
        loss = F.cross_entropy(model(x.to(where, dtype)), target.to(where))
        loss = loss + sum(create_regularizer(name, weight=0.01)(model) for name in list_regularizers())
        loss.backward()
        found.append([loss.detach().cpu().float(), *(p.grad.cpu().float() for p in model.parameters())])
    assert_close(found[0], found[1], rtol=1e-2, atol=1e-3)


def test_scores_of_kernels_against_numpy(device):
    weight = torch.randn(4, 3, 3, 3)
    scores = {name: values.cpu().numpy() for name, values in all_scores(weight.to(device)).items()}
    kernels = weight.double().numpy()
    assert np.allclose(scores['spectral_norm'], np.linalg.norm(kernels, 2, axis=(2, 3)))
    assert np.allclose(scores['det'], np.abs(np.linalg.det(kernels)))
    assert np.allclose(scores['spectral_radius'], np.abs(np.linalg.eigvals(kernels)).max(-1))


@pytest.mark.parametrize('amp', [torch.float32, torch.bfloat16])
def test_pruned_kernels_stay_zero_in_training(device, amp):
    model = small().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = KernelPruner(model, amount=0.5)
    pruner.attach(optimizer)
    pruned = pruner.prune().pruned
    x = torch.randn(4, 3, 16, 16, device=device).contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp is torch.bfloat16):
            loss = model(x).square().mean() + create_regularizer('basis_ortho')(model)
        loss.backward()
        optimizer.step()
    assert pruner.report.pruned == pruned and torch.isfinite(loss)


def test_calibration_lowers_the_error(device):
    """Fitted to its own images, a pruned network comes nearer to what it was."""
    model, x = small().to(device).eval(), torch.randn(64, 3, 16, 16, device=device)
    pruned = prune_kernels(copy.deepcopy(model), amount=0.3)
    fitted = calibrate(pruned, model, [x], rounds=1)
    with torch.no_grad():
        truth = model(x)
        before, after = ((net(x) - truth).square().sum() for net in (pruned, fitted))
    assert fitted.conv1.weight.device.type == device.type and after < before
