"""Feature distillation: its loss by hand, and that it lives with everything else a run can do."""
import csv
import os
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from timm_lean import LeanError, load_model, save_model, share
from timm_lean.pruning import KernelPruner
from timm_lean.pruning.report import live_kernels
from timm_lean.regularizers import create_regularizer
from timm_lean.training import TrainConfig, train
from timm_lean.training.distillation import DistilledTask, load_teacher
from timm_lean.training.engine import Trainer
from timm_lean_cli import main

CPU = torch.device('cpu')
NARROW = dict(layers=[2, 1, 1], channels=[8, 8, 8], shared_rank=4, unique_rank=1)
WIDE = dict(layers=[1, 1, 1], channels=[8, 8, 12])


def network(seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model('resnet20_cifar', **{**NARROW, **kwargs})


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    """A network of another width, so that a projection is trained."""
    path = tmp_path_factory.mktemp('teacher') / 'teacher.safetensors'
    torch.manual_seed(1)
    save_model(timm.create_model('resnet20_cifar', **WIDE), path)
    return str(path)


def small(folder, teacher, **kwargs):
    settings = dict(
        model='resnet20_cifar', model_args=NARROW, img_size=8, train_images=64, epochs=1, batch_size=16, workers=0,
        cache=True, device='cpu', distill=teacher, output=str(folder))
    return TrainConfig(**{**settings, **kwargs})


def rows(folder):
    with open(folder / 'summary.csv') as f:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(f)]


@pytest.mark.parametrize('wide', [False, True])
def test_the_loss_by_hand(wide):
    student, teacher = network(), network(2, **(WIDE if wide else {})).eval()
    regularizer = create_regularizer('basis_ortho', weight=3.)
    task = DistilledTask(student, teacher, 0.5, 8, [regularizer], verbose=False)
    task.train()
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    x, target = torch.randn(4, 3, 8, 8), torch.arange(4)
    result = task(x, target)
    features = student.forward_features(x).mean((2, 3))
    projection = task.trainable_module.projection
    assert (projection is None) == (not wide)
    ours = features if projection is None else features @ projection.weight.T + projection.bias
    distance = (ours - teacher.forward_features(x).mean((2, 3))).square().mean()
    wanted = F.cross_entropy(student.get_classifier()(features), target) + 0.5 * distance + 3 * regularizer(student)
    assert result['loss'].item() == pytest.approx(wanted.item(), rel=1e-4)
    result['loss'].backward()
    assert all(p.grad is not None for p in task.trainable_module.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_sees_images_normalized_its_way():
    student, teacher = network(), network(2)
    student.pretrained_cfg = {**student.pretrained_cfg, 'mean': (0.1, 0.2, 0.3), 'std': (0.5, 0.5, 0.5)}
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, 'mean': (0.5, 0.5, 0.5), 'std': (0.2, 0.2, 0.2)}
    task = DistilledTask(student, teacher, 1., 8, verbose=False)
    seen = []
    teacher.conv1.register_forward_hook(lambda m, args, y: seen.append(args[0]))
    pixels = torch.rand(2, 3, 8, 8)
    task((pixels - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / 0.5, torch.arange(2))
    torch.testing.assert_close(seen[0], (pixels - 0.5) / 0.2)


def test_a_student_like_its_teacher_has_nothing_to_learn_from_it():
    model = network().eval()
    task = DistilledTask(model, network().eval(), 1., 8, verbose=False).eval()
    assert task(torch.randn(2, 3, 8, 8), torch.arange(2))['kd_loss'].item() == 0


@pytest.mark.slow
def test_the_converted_network_returns_to_its_original(tmp_path):
    train(small(tmp_path / 'd', '', model_args=dict(layers=[2, 1, 1], channels=[8, 8, 8]), train_images=None, epochs=2,
                batch_size=64, lr=0.05))
    original = str(tmp_path / 'd' / 'last.safetensors')
    save_model(share(load_model(original), shared_rank=6), tmp_path / 's.safetensors')
    train(small(tmp_path / 'run', original, model=str(tmp_path / 's.safetensors'), model_args={}, train_images=None,
                epochs=3, batch_size=64, lr=0.02, distill_weight=10.))
    losses = [row['train_kd_loss'] for row in rows(tmp_path / 'run')]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize('options', [
    dict(ema=True, ema_decay=0.5, reg=['basis_ortho=10']),
    dict(amp='bf16', grad_accum=2, clip_grad=1.0),
    dict(amp='fp16', mixup=0.2, smoothing=0.1),
    dict(init='conv_similarity', init_steps=2, ema=True, channels_last=True),
], ids=lambda o: '-'.join(o))
def test_every_option_trains_and_loads(tmp_path, teacher, options):
    train(small(tmp_path / 'run', teacher, **options))
    model = load_model(tmp_path / 'run' / 'last.safetensors')
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any('projection' in name for name in load_file(tmp_path / 'run' / 'last.safetensors'))
    row = rows(tmp_path / 'run')[0]
    assert row['train_kd_loss'] > 0 and row['train_loss'] >= row['train_task_loss'] + row['train_kd_loss'] - 1e-4


def test_the_conv_similarity_start_is_in_the_average_too(tmp_path, teacher):
    trainer = Trainer(small(tmp_path / 'run', teacher, init='conv_similarity', init_steps=2, ema=True), CPU)
    average = trainer.task.get_eval_model(ema=True)
    assert all(torch.equal(a, b) for a, b in zip(average.parameters(), trainer.model.parameters(), strict=True))


@pytest.mark.slow
def test_resuming_ends_at_the_same_weights(tmp_path, teacher):
    options = dict(ema=True, ema_decay=0.5, epochs=3)
    train(small(tmp_path / 'whole', teacher, **options))
    trainer = Trainer(small(tmp_path / 'parts', teacher, **options), CPU)
    trainer.config.epochs = 2  # as if killed after the second epoch
    trainer.fit()
    with pytest.raises(LeanError, match='another --distill'):
        train(small(tmp_path / 'parts', '', **options, resume=True))
    train(small(tmp_path / 'parts', teacher, **options, resume=True))
    whole, parts = (load_file(tmp_path / d / 'last.safetensors') for d in ('whole', 'parts'))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    assert rows(tmp_path / 'whole')[-1]['train_kd_loss'] == rows(tmp_path / 'parts')[-1]['train_kd_loss']


def test_a_pruned_student_stays_pruned(tmp_path, teacher):
    model = network()
    KernelPruner(model, criterion='weight', amount=0.5).prune()
    save_model(model, tmp_path / 'pruned.safetensors')
    train(small(tmp_path / 'run', teacher, model=str(tmp_path / 'pruned.safetensors'), model_args={}, ema=True))
    after = load_model(tmp_path / 'run' / 'last.safetensors')
    for name, module in load_model(tmp_path / 'pruned.safetensors').named_modules():
        if isinstance(module, torch.nn.Conv2d):
            assert torch.equal(live_kernels(module.weight), live_kernels(after.get_submodule(name).weight)), name


@pytest.mark.slow
def test_compiled(teacher):
    x, target = torch.randn(4, 3, 8, 8), torch.arange(4)
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        task = DistilledTask(network(), load_model(teacher), 1., 8, [create_regularizer('basis_ortho')], verbose=False)
        if compiled:
            task.compile(backend='aot_eager')
        task.train()
        losses.append(task(x, target)['loss'].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_two_gloo_processes(tmp_path, teacher):
    subprocess.run([
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'timm_lean_cli',
        'train', '--model', 'resnet20_cifar', '--model-args', 'layers=[2,1,1]', 'shared_rank=8', '--data', 'digits',
        '--img-size', '8', '--train-images', '64', '--batch-size', '16', '--epochs', '1', '--workers', '0', '--device',
        'cpu', '--ema', '--distill', teacher, '--reg', 'basis_ortho=1', '--output', str(tmp_path / 'run')],
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, check=True, capture_output=True, timeout=240)
    assert rows(tmp_path / 'run')[0]['train_kd_loss'] > 0


def test_the_command_shares_and_distills(tmp_path, capsys):
    save_model(timm.create_model('resnet20_cifar', layers=[2, 2, 2]), tmp_path / 'd.safetensors')
    assert main([
        'share', str(tmp_path / 'd.safetensors'), '--params', '0.6', '-o', str(tmp_path / 's.safetensors'), '--data',
        'digits', '--img-size', '8', '--workers', '0', '--finetune-epochs', '1', '--distill', '--device', 'cpu',
        '--calibrate', '0']) == 0
    assert ['before', 'converted', 'fine-tuned'] in [line.split() for line in capsys.readouterr().out.splitlines()]
    assert load_model(tmp_path / 's.safetensors').lean_steps[0]['op'] == 'share'
    assert not list(tmp_path.glob('.*'))
    assert main(['share', str(tmp_path / 'd.safetensors'), '--params', '0.6', '-o', str(tmp_path / 't.safetensors'),
                 '--distill']) == 2
    assert '--finetune-epochs' in capsys.readouterr().err and not (tmp_path / 't.safetensors').exists()


@pytest.mark.parametrize('teacher, message', [
    ('missing.safetensors', 'missing.safetensors'),
    ('resnet_nope', "Unknown model 'resnet_nope'"),
    ('resnet20_cifar', 'timm has no trained weights'),
])
def test_teachers_that_cannot_be(teacher, message):
    with pytest.raises(LeanError, match=message):
        load_teacher(teacher)


@pytest.mark.parametrize('teacher, message', [
    (dict(model_name='resnet10t', in_chans=1), 'The teacher for --distill gives no features for images .3, 8, 8.'),
    (dict(model_name='vit_tiny_patch16_224'), 'The teacher for --distill gives no features'),
    (dict(model_name='resnet10t', global_pool='', num_classes=0), 'must give pooled features'),
])
def test_teachers_that_do_not_fit(teacher, message):
    with pytest.raises(LeanError, match=message):
        DistilledTask(network(), timm.create_model(**teacher), 1., 8, verbose=False)


def test_weight_must_be_a_number(tmp_path):
    with pytest.raises(LeanError, match='distill_weight must be a number of at least 0'):
        small(tmp_path / 'run', 'x', distill_weight=-1)
