"""torch.compile and torch.export of a training step: one graph, with every regularizer and a pruner, and its values."""
import pytest
import timm
import torch
import torch.nn as nn
from torch.testing import assert_close

from timm_lean.pruning import KernelPruner
from timm_lean.regularizers import create_regularizer, list_regularizers
from timm_lean.training.task import RegularizedTask


class Step(nn.Module):
    """The loss of a small network's batch, all regularizers added."""

    def __init__(self):
        super().__init__()
        model = timm.create_model('resnet32_cifar_s8u1', layers=(2,), channels=(8,), shared_rank=4)
        regularizers = [create_regularizer(name, weight=1.) for name in list_regularizers()]
        self.task = RegularizedTask(model, regularizers, verbose=False)

    def forward(self, x, target):
        return self.task(x, target)['loss']


def gradients(step, loss):
    step.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in step.named_parameters()}


@pytest.mark.slow
def test_a_step_with_regularizers_and_pruner_is_one_graph_each():
    """`fullgraph=True` raises at a graph break; the gradients are those of the uncompiled step."""
    step, x, target = Step(), torch.randn(4, 3, 8, 8), torch.arange(4)
    pruner = KernelPruner(step.task.trainable_module, criterion='weight', amount=0.5)
    pruned = pruner.prune().pruned
    step(x, target)  # regularizers look for their layers outside the graph, as the trainer lets them
    compiled = torch.compile(step, backend='aot_eager', fullgraph=True)
    found = gradients(step, loss := compiled(x, target))
    assert_close(loss, wanted := step(x, target))
    assert_close(found, gradients(step, wanted))

    with torch.no_grad():
        for p in step.parameters():
            p.add_(1.)
    assert pruner.report.pruned == 0
    torch.compile(pruner.step, backend='aot_eager', fullgraph=True)()
    assert pruner.report.pruned == pruned


@pytest.mark.slow
def test_a_step_with_regularizers_exports():
    """Without a pass before: a shared basis is one in the graph too, and NaN is not looked for in it."""
    step, x, target = Step(), torch.randn(4, 3, 8, 8), torch.arange(4)
    exported = torch.export.export(step, (x, target)).module()
    found = gradients(exported, loss := exported(x, target))
    assert_close(loss, wanted := step(x, target))
    assert_close(found, gradients(step, wanted))
