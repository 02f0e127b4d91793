"""What runs on a GPU, on a machine without one: torch's fake tensors are on 'cuda', have shapes and no values.

They raise on tensors of two devices in one operation and on every hidden wait for the device (`.item()`, `bool(x)`,
boolean indexing). The backward pass and copies of a model need a real context and are left out here; the last test
counts the reads of a whole training epoch on the CPU.
"""
import pytest
import timm
import torch
from timm.data import Mixup
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_lean.pruning import KernelPruner
from timm_lean.regularizers import create_regularizer, list_regularizers
from timm_lean.training import TrainConfig, data, engine
from timm_lean.training.task import RegularizedTask

CUDA = torch.device('cuda')
FAMILIES = [
    'resnet20_cifar', 'resnet32_cifar_s8u1', 'resnet34_s32u1_dual', 'resnet50_sharedpp', 'mobilenetv2_100_sharedpp',
    'densenet121_cifar_s64u4', 'resnext50_cifar_s16u1', 'mobilenetv2_cifar_sharedpp', 'lean_densenet',
    'lean_efficientnet']


class Waits(TorchDispatchMode):
    """Counts reads of a value from the device; a fake one is 1."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
            if isinstance(args[0], FakeTensor):
                return 1.
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits():
    with FakeTensorMode(), CUDA, Waits() as mode:
        yield mode


def small():
    return timm.create_model('resnet32_cifar_s8u1', layers=(2, 2, 2))


@pytest.mark.parametrize('name', FAMILIES)
def test_forward_of_one_network_per_family(name, waits):
    model = timm.create_model(name)
    assert {p.device.type for p in model.parameters()} == {'cuda'}
    assert model(torch.randn(2, 3, 32, 32)).device.type == 'cuda'
    assert waits.count == 0


@pytest.mark.parametrize('name', list_regularizers())
def test_a_regularizer_looks_for_nan_once_and_never_waits_again(name, waits):
    model, regularizer = small(), create_regularizer(name, weight=1.)
    regularizer(model)
    first = waits.count
    assert regularizer(model).device.type == 'cuda'
    assert waits.count == first <= sum(p.ndim == 4 for p in model.parameters()), 'one look at each filter bank'


def test_keeping_zeros_does_not_wait(waits):
    model = small()
    pruner = KernelPruner(model, criterion='weight', amount=0.5, schedule='cubic', begin=0, end=10)
    made = waits.count
    for _ in range(3):
        pruner.step()
    assert waits.count == made


def test_cached_batches_stay_on_the_device(waits):
    loader = data.CachedLoader.__new__(data.CachedLoader)
    loader.images, loader.targets = torch.zeros(64, 3, 32, 32, dtype=torch.uint8), torch.zeros(64, dtype=torch.long)
    loader.mean, loader.std = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    loader.batch_size, loader.padding, loader.hflip, loader.shuffle = 16, 4, 0.5, True
    loader.rank, loader.world = 0, 1
    devices = {tensor.device.type for batch in loader for tensor in batch}
    assert devices == {'cuda'} and waits.count == 0


def test_mixing_loss_and_accuracy_do_not_wait(waits):
    task = RegularizedTask(
        small(), [create_regularizer('basis_ortho', weight=1.)], device=CUDA, verbose=False,
        criterion_kwargs=dict(soft_targets=True))
    mix = Mixup(0.2, 1., label_smoothing=0.1, num_classes=10)
    made = waits.count
    for _ in range(3):
        target = torch.zeros(16, dtype=torch.long)
        x, soft = mix(torch.randn(16, 3, 32, 32), target)
        result = task(x, soft)
        correct = (result['output'].argmax(1) == target).sum()
        assert {result['loss'].device.type, correct.device.type} == {'cuda'}
    assert waits.count == made


def test_an_epoch_looks_at_the_loss_once_every_twenty_steps(tmp_path, monkeypatch):
    """In steps 1, 21 and 41 of 41; within the steps, with an average and zeros to keep, nothing is read."""
    config = TrainConfig.from_args(dict(
        model='resnet32_cifar_s8u1', model_args=dict(layers=[2, 1, 1], channels=[8, 8, 8], shared_rank=4),
        data='digits', img_size=8, train_images=41 * 4, batch_size=4, workers=0, epochs=1, cache=True, device='cpu',
        opt='momentum', reg=['basis_ortho=10'], mixup=0.2, ema=True, prune=dict(criterion='weight', amount=0.3),
        output=str(tmp_path / 'run')))
    trainer = engine.Trainer(config, torch.device('cpu'))
    looks, reads, step, means = [], [], trainer._step, engine._means

    def counted(*args, **kwargs):
        with Waits() as mode:
            result = step(*args, **kwargs)
        reads.append(mode.count)
        return result

    monkeypatch.setattr(trainer, '_step', counted)
    monkeypatch.setattr(engine, '_means', lambda sums, done, images: looks.append(done) or means(sums, done, images))
    trainer._train_epoch(0)
    assert looks == [1, 21, 41]
    assert sum(reads[1:]) == 0, 'the first step prunes and looks for NaN'
