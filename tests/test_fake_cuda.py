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
from conftest import FAMILIES, SOME_FAMILIES
from mmcv_calls import map_tensors, record_calls
from timm.data import Mixup
from timm.utils import model_ema
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from timm_lean import mmcv_ext
from timm_lean.calibration import outputs
from timm_lean.calibration.images import pick_positions
from timm_lean.calibration.layers import linear_map, rows_of
from timm_lean.calibration.moments import HeldOut, Moments
from timm_lean.layers import SharedBasisConv2d
from timm_lean.pruning import KernelPruner
from timm_lean.regularizers import create_regularizer, list_regularizers
from timm_lean.regularizers.conv_similarity import _basis
from timm_lean.training import TrainConfig, data, engine
from timm_lean.training.evaluate import evaluate
from timm_lean.training.task import RegularizedTask

CUDA = torch.device('cuda')


def _has_fake_cuda() -> bool:
    """Whether layers can be built on it: torch before 2.11 asks for a driver."""
    try:
        with FakeTensorMode(), CUDA:
            nn.Linear(1, 1)
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(not _has_fake_cuda(), reason='this torch builds no layers on a GPU that is not there')


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
    return timm.create_model('resnet20_cifar', layers=(2,), channels=(16,), shared_rank=4, unique_rank=1)


@pytest.mark.parametrize('name', SOME_FAMILIES)
def test_forward_of_one_network_per_family(name, waits):
    model = timm.create_model(name, **FAMILIES[name])
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


def test_output_errors_are_summed_on_the_device(waits, monkeypatch):
    """NCCL joins what lies on GPUs only."""
    places = []
    monkeypatch.setattr(outputs, 'all_reduce', lambda tensors: places.extend(t.device.type for t in tensors))
    part = SimpleNamespace(run=lambda network: network(torch.randn(4, 3, 32, 32)), held=range(4))
    chunk = SimpleNamespace(part=lambda held: part)
    with torch.no_grad():
        held, made = outputs.HeldOutputs(small().eval(), [chunk] * 3), waits.count
        held.error(small().eval())
    assert places == ['cuda'] and waits.count == made + 1


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


def test_an_evaluation_waits_at_its_end_only(waits):
    found = []
    for batches in (1, 5):
        before = waits.count
        loader = [(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)) for _ in range(batches)]
        evaluate(small(), loader, CUDA)
        found.append(waits.count - before)
    assert found[0] == found[1]


@pytest.mark.parametrize(('steps', 'expected', 'reads_per_step', 'options'), [
    (41, [1, 21, 41], 0, dict(mixup=0.2, ema=True)),
    (3, [1, 3], 0, dict(amp='bf16', channels_last=True, clip_grad=1., grad_accum=2)),
    (3, [1, 3], 1, dict(amp='fp16', smoothing=0.1))])
def test_an_epoch_looks_at_the_loss_once_every_twenty_steps(
        steps, expected, reads_per_step, options, tmp_path, monkeypatch):
    """In steps 1, 21 and 41 of 41; within the steps, with an average and zeros to keep, nothing is read.

    torch's scaler of float16 gradients reads once a step whether it found infinite ones.
    """
    config = TrainConfig.from_args(dict(
        model='resnet20_cifar', model_args=dict(layers=[2], channels=[8], shared_rank=4, unique_rank=1),
        data='digits', img_size=8, train_images=steps * 4, batch_size=4, workers=0, epochs=1, cache=True, device='cpu',
        opt='momentum', reg=['basis_ortho=10'], prune=dict(criterion='weight', amount=0.3),
        output=str(tmp_path / 'run'), **options))
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
    assert looks == expected
    assert set(reads[1:]) == {reads_per_step}, 'the first step prunes and looks for NaN'


@pytest.mark.parametrize(('criterion', 'scope'), [('weight', 'global'), ('spectral_norm', 'layer'), ('det', 'filter')])
def test_a_mask_update_stays_on_the_device(criterion, scope, waits):
    """Whatever it waits for: it happens once an epoch."""
    pruner = KernelPruner(
        small(), criterion=criterion, amount=0.5, scope=scope, min_keep=1., schedule='cubic', begin=0, end=10)
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

    Deformable attention waits for the sizes of its levels. Left out are Soft-NMS, NMS-match and RoI pooling, which go
    by values.
    """
    calls = record_calls(monkeypatch)
    assert calls.keys() == {name for part in mmcv_ext.SUPPORTED.values() for name in part}
    found = {}
    with FakeTensorMode(shape_env=ShapeEnv()), CUDA:
        for name in calls.keys() - {'softnms', 'nms_match', 'roi_pool_forward'}:
            function, args, kwargs = map_tensors(
                calls[name], lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype))
            with Waits() as mode:
                function(*args, **kwargs)
            found[name] = mode.count
    assert {name for name, count in found.items() if count} == {'ms_deform_attn_forward', 'ms_deform_attn_backward'}
