"""What runs on a GPU, on a machine without one: torch's fake tensors are on 'cuda', have shapes and no values.

They raise on tensors of two devices in one operation and on every hidden wait for the device (`.item()`, `bool(x)`,
boolean indexing). The backward pass and copies of a model need a real context and are left out here; one test counts
the reads of a whole training epoch on the CPU.
"""
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.utils import model_ema
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from timm_lean import mmcv_ext
from timm_lean.calibration.images import pick_positions
from timm_lean.calibration.layers import linear_map, rows_of
from timm_lean.calibration.moments import HeldOut, Moments
from timm_lean.layers import SharedBasisConv2d
from timm_lean.pruning import KernelPruner
from timm_lean.regularizers import create_regularizer, list_regularizers
from timm_lean.regularizers.conv_similarity import _basis
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
                return 1. if args[0].is_floating_point() else 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits():
    with FakeTensorMode(), CUDA, Waits() as mode:
        yield mode
    _basis.cache_clear()  # it holds tensors of this mode


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


@pytest.mark.parametrize(('criterion', 'scope'), [('weight', 'global'), ('spectral_norm', 'layer'), ('det', 'filter')])
def test_a_mask_update_stays_on_the_device(criterion, scope, waits):
    """Whatever it waits for: it happens once an epoch."""
    model = timm.create_model('resnet32_cifar_s8u1', layers=(2, 1, 1))
    pruner = KernelPruner(
        model, criterion=criterion, amount=0.5, scope=scope, min_keep=1., schedule='cubic', begin=0, end=10)
    assert pruner.set_progress(0.) and pruner._kept, 'min_keep has something to give back'
    assert {dead.device.type for dead in pruner._dead.values()} == {'cuda'}


def test_averaging_the_weights_does_not_wait(waits, monkeypatch):
    """timm's average copies the model and makes a generator, which both need a real device: they are given to it."""
    model = small()
    monkeypatch.setattr(model_ema, 'deepcopy', lambda module: small())
    generator = torch.Generator()
    monkeypatch.setattr(torch, 'Generator', lambda device='cpu': generator)
    average = model_ema.ModelEmaV3(model, decay=0.99, use_warmup=True)
    pruner = KernelPruner(model, amount=0.5)
    pruner.follow(average)
    pruner.prune()
    before = waits.count
    average.update(model, step=3)
    pruner.step()
    assert waits.count == before and {p.device.type for p in average.parameters()} == {'cuda'}


@pytest.mark.parametrize('keep_samples', [False, True])
def test_sums_and_fit_of_calibration_stay_on_the_device(keep_samples, waits):
    shared = next(m for m in small().modules() if isinstance(m, SharedBasisConv2d))
    for layer, shape in ((nn.Conv2d(16, 24, 3, groups=2), (8, 16, 8, 8)), (nn.Linear(16, 10), (8, 16)),
                         (shared, (8, shared.in_channels, 8, 8))):
        x, fitted = torch.randn(shape), linear_map(layer)
        count = rows_of(layer, layer(x)).shape[1]
        samples = fitted.inputs(x, pick_positions(count, 16, fitted.size, 10 ** 6, seed=0, device=CUDA))
        moments = Moments(fitted.groups, fitted.filters, fitted.size, keep_samples, CUDA)
        held = HeldOut(fitted.groups, fitted.filters, CUDA)
        lacking = torch.randn(len(samples), fitted.groups, fitted.filters)
        before = waits.count
        moments.add(samples, lacking)
        held.add(samples, lacking, lacking)
        assert waits.count == before, 'only the fit looks at what it has'
        moments.reduce()
        change = moments.solve(1e-3, fitted.free, fitted.bias, fitted.block)
        fitted.assign(fitted.weight + change)
        assert change.shape == fitted.weight.shape
        assert {change.device.type, held.error_after(change).device.type, layer(x).device.type} == {'cuda'}


def test_loss_terms_of_the_hook_do_not_wait(waits):
    hooks = pytest.importorskip('timm_lean.mmdet.hooks', exc_type=ImportError)

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = small()

        def forward(self, inputs, samples=None, mode='tensor'):
            return {'loss_cls': self.backbone(inputs).mean()}

    hook = hooks.RegularizerHook([dict(type=name) for name in list_regularizers()])
    model = Detector()
    hook.before_train(SimpleNamespace(hooks=[hook], model=model, iter=0, max_iters=10))
    before = waits.count
    losses = model(torch.randn(2, 3, 32, 32), mode='loss')
    assert losses.keys() > {f'loss_{name}' for name in list_regularizers()}
    assert {loss.device.type for loss in losses.values()} == {'cuda'} and waits.count == before


def test_operators_of_detectors_do_not_wait(monkeypatch):
    """Every call that forward and backward passes make of the stand-in on the CPU, repeated on the other device.

    Not among them: those that choose boxes and RoI pooling make tensors whose size depends on values, and mmcv's carafe
    has a backward pass on a real GPU only. Deformable attention waits for the sizes of its levels.
    """
    pytest.importorskip('mmcv')
    assert mmcv_ext.install()
    from mmcv import _ext, ops
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
    calls = {}

    def recorded(name, function):
        return lambda *args, **kwargs: calls.setdefault(name, (function, args, kwargs)) and function(*args, **kwargs)

    names = {name for part in mmcv_ext.SUPPORTED.values() for name in part}
    for name in names:
        monkeypatch.setattr(_ext, name, recorded(name, getattr(_ext, name)))

    def rand(*shape):
        return torch.rand(shape, requires_grad=True)

    x, rois, target = rand(2, 4, 8, 8), torch.tensor([[0, 0., 0, 6, 6], [1, 1, 1, 7, 7]]), torch.tensor([0, 1, 2])
    outputs = [
        ops.roi_align(x, rois, (2, 2), 1., 2, 'avg', True), ops.roi_pool(x, rois, (2, 2)),
        ops.deform_conv2d(x, rand(2, 18, 8, 8), rand(4, 4, 3, 3), 1, 1),
        ops.modulated_deform_conv2d(x, rand(2, 18, 8, 8), rand(2, 9, 8, 8), rand(4, 4, 3, 3), rand(4), 1, 1),
        ops.sigmoid_focal_loss(rand(3, 4), target, 2., 0.25, None, 'mean'),
        ops.softmax_focal_loss(rand(3, 4), target, 2., 0.25, None, 'mean'),
        MultiScaleDeformableAttnFunction.apply(
            rand(1, 2, 2, 4), torch.ones(2, 2, dtype=torch.long), torch.arange(2), rand(1, 3, 2, 2, 4, 2),
            rand(1, 3, 2, 2, 4), 64)]
    sum(output.sum() for output in outputs).backward()
    with torch.no_grad():
        ops.carafe(x, rand(2, 9, 16, 16), 3, 1, 2)
        ops.carafe_naive(x, rand(2, 9, 16, 16), 3, 1, 2)
        ops.masked_conv.masked_conv2d(x[:1], torch.ones(1, 8, 8), rand(4, 4, 3, 3), rand(4), 1)
        ops.bbox_overlaps(rois[:, 1:], rois[:, 1:])
    assert names - calls.keys() == {'nms', 'softnms', 'nms_match', 'carafe_backward', 'carafe_naive_backward'}

    def fake(value):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype) if torch.is_tensor(value) else value

    found = {}
    with FakeTensorMode(), CUDA:
        calls.pop('roi_pool_forward')
        for name, (function, args, kwargs) in calls.items():
            with Waits() as mode:
                function(*map(fake, args), **{key: fake(value) for key, value in kwargs.items()})
            found[name] = mode.count
    assert {name for name, count in found.items() if count} == {'ms_deform_attn_forward', 'ms_deform_attn_backward'}
