"""torch.compile and torch.export of a training step: one graph, with every regularizer and a pruner, and its values.

In every precision and memory format that `timm-lean train` offers.
"""
import shutil

import pytest
import timm
import torch
import torch.nn as nn
from torch._inductor import config as inductor_config
from torch.testing import assert_close

from timm_lean.pruning import KernelPruner
from timm_lean.regularizers import create_regularizer, list_regularizers
from timm_lean.training.device import autocast
from timm_lean.training.task import RegularizedTask

PRECISIONS = ['', 'bf16', 'fp16']


class Step(nn.Module):
    """The loss of a small network's batch, all regularizers added."""

    def __init__(self, device, amp='', names=None):
        super().__init__()
        model = timm.create_model('resnet20_cifar', layers=(2,), channels=(8,), shared_rank=4, unique_rank=1)
        with torch.no_grad():  # away from orthogonal bases, where the spectral norm of `B B^T - I` has no gradient
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        regularizers = [create_regularizer(name, weight=1.) for name in names or list_regularizers()]
        self.task = RegularizedTask(model, regularizers, device=device, verbose=False)
        self.to(memory_format=torch.channels_last if amp else torch.contiguous_format)
        self.device, self.amp = device, amp

    def forward(self, x, target):
        with autocast(self.device, self.amp):
            return self.task(x, target)['loss']

    def batch(self):
        x = torch.randn(4, 3, 8, 8, device=self.device)
        return x.to(memory_format=torch.channels_last if self.amp else torch.contiguous_format), torch.arange(
            4, device=self.device)


def gradients(step, loss):
    step.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in step.named_parameters()}


def assert_same_step(step, other, batch, rtol=1e-5):
    """Loss and gradients, relative to the largest gradient of all."""
    found = gradients(step, loss := other(*batch))
    wanted = gradients(step, expected := step(*batch))
    assert_close(loss, expected, rtol=rtol, atol=0.)
    largest = max(g.abs().max().item() for g in wanted.values())
    assert_close(found, wanted, rtol=rtol, atol=rtol * largest)


def test_a_step_with_regularizers_has_no_graph_break(device):
    """`fullgraph=True` raises at one. All regularizers are in the slow tests."""
    torch.compiler.reset()
    step = Step(device, names=['basis_ortho', 'conv_similarity'])
    batch = step.batch()
    expected = step(*batch)  # regularizers look for their layers outside the graph, as the trainer lets them
    assert_close(torch.compile(step, backend='eager', fullgraph=True)(*batch), expected)


@pytest.mark.slow
@pytest.mark.parametrize('amp', PRECISIONS)
def test_a_compiled_step_has_the_gradients_of_the_other(amp, device):
    torch.compiler.reset()
    step = Step(device, amp)
    batch = step.batch()
    step(*batch)
    compiled = torch.compile(step, backend='aot_eager', fullgraph=True)
    assert_same_step(step, compiled, batch, 1e-2 if amp else 1e-5)


def test_keeping_zeros_is_one_graph(device):
    torch.compiler.reset()
    model = Step(device).task.trainable_module
    pruner = KernelPruner(model, criterion='weight', amount=0.5)
    pruned = pruner.prune().pruned
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.)
    assert pruner.report.pruned == 0
    torch.compile(pruner.step, backend='aot_eager', fullgraph=True)()
    assert pruner.report.pruned == pruned


@pytest.mark.slow  # the first run on a machine compiles torch's headers
@pytest.mark.skipif(not any(map(shutil.which, ('g++', 'c++', 'clang++'))), reason='no C++ compiler')
@pytest.mark.parametrize('amp', PRECISIONS)
def test_a_step_by_inductor(amp, device):
    torch.compiler.reset()
    step = Step(device, amp)
    batch = step.batch()
    step(*batch)
    with inductor_config.patch(compile_threads=1):  # no pool of processes for a handful of kernels
        assert_same_step(step, torch.compile(step, fullgraph=True), batch, 2e-2 if amp else 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('amp', PRECISIONS)
def test_a_step_with_regularizers_exports(amp, device):
    """Without a pass before: a shared basis is one in the graph too, and NaN is not looked for in it."""
    step = Step(device, amp)
    batch = step.batch()
    exported = torch.export.export(step, batch).module()
    found = gradients(exported, loss := exported(*batch))
    wanted = gradients(step, expected := step(*batch))
    rtol = 1e-2 if amp else 1e-5
    assert_close(loss, expected, rtol=rtol, atol=0.)
    assert_close(found, wanted, rtol=rtol, atol=rtol * max(g.abs().max().item() for g in wanted.values()))
