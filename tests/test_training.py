"""The classification engine: what a run writes, how it resumes, and that its parts do what they say."""
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from timm.data import resolve_data_config

from timm_lean import load_model
from timm_lean.errors import LeanError
from timm_lean.regularizers import create_regularizer
from timm_lean.training import TrainConfig, train
from timm_lean.training.config import CONFIGS, list_configs, load_yaml
from timm_lean.training.data import CachedLoader, SplitError, create_eval_loader, open_dataset, shifted_crop
from timm_lean.training.engine import Trainer
from timm_lean.training.task import RegularizedTask

CPU = torch.device('cpu')


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    """Two classes, 24 training and 8 test images each of 12 x 12 pixels: horizontal and vertical stripes in noise."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split, count in (('train', 24), ('test', 8)):
        for name in ('across', 'down'):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (12, 12, 3))
                stripes = pixels[i % 2::2] if name == 'across' else pixels[:, i % 2::2]
                stripes += 150
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f'{i:03}.png')
    return root


def small(tmp_path, **kwargs):
    """A run of a second or two."""
    settings = dict(
        model='resnet20_cifar', model_args=dict(layers=[2, 1, 1], channels=[8, 8, 8], shared_rank=4, unique_rank=1),
        data='digits', img_size=8, train_images=64, epochs=1, batch_size=16, workers=0, cache=True, device='cpu',
        output=str(tmp_path / 'run'))
    return TrainConfig(**{**settings, **kwargs})


def rows(directory):
    with open(Path(directory) / 'summary.csv') as f:
        return list(csv.DictReader(f))


def test_run_writes_checkpoints_summary_curves_and_settings(tmp_path):
    result = train(small(tmp_path, epochs=2, reg=['basis_ortho=10']))
    run = tmp_path / 'run'
    assert Path(result['output']) == run
    assert {'last.safetensors', 'best.safetensors', 'resume.pt', 'summary.csv', 'curves.png', 'args.yaml'} <= {
        p.name for p in run.iterdir()}
    assert not list(run.rglob('*.tmp'))
    table = rows(run)
    assert [float(r['epoch']) for r in table] == [1, 2]
    assert {'train_loss', 'train_loss_basis_ortho', 'train_basis_ortho', 'train_top1', 'eval_top1', 'lr'} <= set(
        table[0])
    assert float(table[1]['train_loss_basis_ortho']) == pytest.approx(10 * float(table[1]['train_basis_ortho']))
    assert float(table[0]['lr']) > float(table[1]['lr'])
    model = load_model(run / 'best.safetensors')
    assert model.num_classes == 10 and model.pretrained_cfg['label_names'] == [str(i) for i in range(10)]
    assert model.pretrained_cfg['input_size'] == (3, 8, 8)
    assert Image.open(run / 'curves.png').size[0] > 100


def test_args_yaml_reruns_the_run_identically(tmp_path):
    train(small(tmp_path, reg=['basis_ortho=10']))
    settings = yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())
    train(TrainConfig.from_args({**settings, 'output': str(tmp_path / 'again')}))
    assert_same_tensors(tmp_path / 'run' / 'last.safetensors', tmp_path / 'again' / 'last.safetensors')


def test_seed_decides_the_result(tmp_path):
    for name, seed in (('a', 1), ('b', 1), ('c', 2)):
        train(small(tmp_path, seed=seed, output=str(tmp_path / name)))
    assert_same_tensors(tmp_path / 'a' / 'last.safetensors', tmp_path / 'b' / 'last.safetensors')
    with pytest.raises(AssertionError):
        assert_same_tensors(tmp_path / 'a' / 'last.safetensors', tmp_path / 'c' / 'last.safetensors')


def assert_same_tensors(a, b):
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.parametrize('options', [
    dict(cache=False, workers=1, aug='crop'),
    dict(cache=False, workers=0, aug='rrc', auto_augment='rand-m5-n1', re_prob=0.2),
    dict(ema=True, ema_decay=0.5),
    dict(amp='bf16', grad_accum=2, clip_grad=1.0),
    dict(amp='fp16'),
    dict(mixup=0.2, cutmix=1.0, smoothing=0.1),
    dict(channels_last=True, decay_all=True, sched='multistep', milestones=[1]),
    dict(opt='adamw', lr=1e-3, warmup_epochs=1, smoothing=0.1, aug='none'),
], ids=lambda o: '-'.join(o))
def test_every_option_trains_and_loads(tmp_path, options, device):
    train(small(tmp_path, **options, device=str(device)))
    model = load_model(tmp_path / 'run' / 'last.safetensors')
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_killed_run_resumes_to_the_bit_identical_end(tmp_path, image_folder):
    """SIGKILL in the middle of training, then --resume, on real files with a worker process."""
    def command(name, *extra):
        return [sys.executable, '-m', 'timm_lean_cli', 'train', '--model', 'resnet20_cifar', '--model-args',
                'shared_rank=8', 'unique_rank=1', 'layers=[2,1,1]', '--data-dir', str(image_folder), '--img-size', '12',
                '--batch-size', '8', '--epochs', '4', '--workers', '1', '--reg', 'basis_ortho=10:cosine', '--ema',
                '--device', 'cpu', '--output', str(tmp_path / name), *extra]

    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    whole = subprocess.Popen(command('whole'), env=environment, stdout=subprocess.DEVNULL)
    killed = subprocess.Popen(command('killed'), env=environment, stdout=subprocess.PIPE, text=True)
    for line in killed.stdout:
        if line.startswith('epoch 2/4'):
            break
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    resumed = subprocess.run(
        command('killed', '--resume'), env=environment, capture_output=True, text=True, check=True)
    assert 'Resuming' in resumed.stdout
    assert whole.wait() == 0
    for name in ('last.safetensors', 'best.safetensors'):
        assert_same_tensors(tmp_path / 'whole' / name, tmp_path / 'killed' / name)
    timings = ('seconds', 'images_per_second')
    numbers = [[{k: v for k, v in r.items() if k not in timings} for r in rows(tmp_path / name)]
               for name in ('whole', 'killed')]
    assert numbers[0] == numbers[1]


def test_resume_before_the_first_save_starts_from_the_beginning(tmp_path, capsys):
    train(small(tmp_path, resume=True))
    assert 'starting from the beginning' in capsys.readouterr().out


def test_resume_extends_a_finished_run(tmp_path):
    train(small(tmp_path))
    result = train(small(tmp_path, epochs=2, resume=True))
    assert [float(r['epoch']) for r in rows(result['output'])] == [1, 2]


def test_failed_save_keeps_the_last_one(tmp_path, monkeypatch):
    train(small(tmp_path))
    before = (tmp_path / 'run' / 'resume.pt').read_bytes()

    def broken(*args, **kwargs):
        args[1].write(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(torch, 'save', broken)
    with pytest.raises(OSError, match='disk full'):
        train(small(tmp_path, epochs=2, resume=True))
    assert (tmp_path / 'run' / 'resume.pt').read_bytes() == before
    assert not list((tmp_path / 'run').glob('*.tmp'))


@pytest.mark.slow
def test_two_gloo_processes_train_one_model(tmp_path, image_folder):
    run = tmp_path / 'run'
    result = subprocess.run([
        sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'timm_lean_cli',
        'train', '--model', 'resnet20_cifar', '--model-args', 'shared_rank=8', 'layers=[2,1,1]', '--data-dir',
        str(image_folder), '--img-size', '12', '--batch-size', '8', '--epochs', '2', '--workers', '0',
        '--device', 'cpu', '--reg', 'basis_ortho=10', '--output', str(run)],
        env={**os.environ, 'OMP_NUM_THREADS': '1'}, check=True, capture_output=True, text=True, timeout=240)
    assert len(rows(run)) == 2
    load_model(run / 'best.safetensors')
    assert result.stdout.count('best top-1') == 1, 'one process speaks for both'


def test_both_of_two_processes_know_the_best_epoch(tmp_path, monkeypatch):
    """The second process, with the first one's part played by stand-ins for the communication."""
    from timm_lean.training import engine
    monkeypatch.setattr(engine.dist, 'barrier', lambda: None)
    monkeypatch.setattr(engine, 'distribute_bn', lambda *args, **kwargs: None)
    monkeypatch.setattr(engine, 'evaluate', lambda *args: {'loss': 1., 'top1': 42., 'top5': 90.})
    trainer = Trainer(small(tmp_path), CPU)
    trainer.rank, trainer.world, trainer.log.primary = 1, 2, False
    result = trainer.fit()
    assert (result['best_top1'], result['best_epoch'], result['last']['eval_top1']) == (42, 1, 42)
    assert not (tmp_path / 'run' / 'last.safetensors').exists(), 'the first process writes'


@pytest.mark.slow
def test_a_process_that_loses_another_says_so_in_one_line(tmp_path):
    code = '''
import os, sys
from timm_lean.training import engine
if os.environ['RANK'] == '1':
    engine.evaluate = lambda *args: os._exit(3)
from timm_lean_cli import main
sys.exit(main(sys.argv[1:]))
'''
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    command = [
        sys.executable, '-c', code, 'train', '--model', 'resnet20_cifar', '--model-args', 'layers=[1,1,1]', '--data',
        'digits', '--img-size', '8', '--train-images', '32', '--batch-size', '8', '--epochs', '1', '--cache',
        '--device', 'cpu', '--output', str(tmp_path / 'run')]
    processes = [
        subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={
            **os.environ, 'OMP_NUM_THREADS': '1', 'RANK': str(rank), 'LOCAL_RANK': str(rank), 'WORLD_SIZE': '2',
            'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(port)}) for rank in range(2)]
    (_, err), _ = [p.communicate(timeout=200) for p in processes]
    assert [p.returncode for p in processes] == [2, 3], err
    assert err.count('Another process of this run has ended') == 1 and 'Traceback' not in err


def test_the_second_run_in_one_folder_is_refused(tmp_path):
    running = Trainer(small(tmp_path), CPU)
    settings = (tmp_path / 'run' / 'args.yaml').read_text()
    for resume in (False, True):
        with pytest.raises(LeanError, match='in use by another run'):
            Trainer(small(tmp_path, epochs=9, resume=resume), CPU)
    assert (tmp_path / 'run' / 'args.yaml').read_text() == settings
    running.fit()
    train(small(tmp_path, epochs=2, resume=True))
    assert len(rows(tmp_path / 'run')) == 2


def test_without_a_terminal_long_epochs_print_lines(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('timm_lean.training.log._LINE_SECONDS', 0)
    monkeypatch.setattr('timm_lean.training.engine._LOG_INTERVAL', 2)
    train(small(tmp_path))
    lines = [line for line in capsys.readouterr().out.splitlines() if 'step' in line]
    assert [line.split('  ')[0] for line in lines] == [f'epoch 1/1, step {n}/4' for n in (1, 3, 4)]
    assert all({'loss', 'top1', 'lr', 'img/s'} <= {word.split()[0] for word in line.split('  ')} for line in lines)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(tmp_path):
    """Same global batch, BN in eval mode, where the average over processes is exact; in float64."""
    x, target = torch.randn(8, 3, 16, 16, dtype=torch.float64), torch.arange(8) % 10
    torch.save((x, target), tmp_path / 'batch.pt')
    torch.multiprocessing.spawn(_gradients_of_rank, args=(2, str(tmp_path)), nprocs=2)
    single = _task()
    single(x, target)['loss'].backward()
    gradients = torch.load(tmp_path / 'gradients.pt')
    assert gradients.keys() == dict(single.trainable_module.named_parameters()).keys()
    for name, p in single.trainable_module.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-6, atol=1e-8)


def _task():
    import timm
    torch.manual_seed(3)
    torch.set_num_threads(1)
    model = timm.create_model('resnet32_cifar_s16u1_dual')
    regularizers = [create_regularizer('basis_ortho', include_unique=True)]
    return RegularizedTask(model, regularizers, verbose=False).double().eval()


def _gradients_of_rank(rank, world, folder):
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=world)
    x, target = torch.load(f'{folder}/batch.pt')
    task = _task()
    task.prepare_distributed()
    task.eval()
    share = slice(rank * 4, rank * 4 + 4)
    task(x[share], target[share])['loss'].backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in task.trainable_module.module.named_parameters()}, f'{folder}/gradients.pt')
    dist.destroy_process_group()


def test_gradient_accumulation_is_one_step_on_the_larger_batch(tmp_path):
    """Two accumulated half batches equal the whole batch when BN does not mix images (eval mode)."""
    weights = []
    for batch_size, accum in ((16, 1), (8, 2)):
        trainer = Trainer(small(tmp_path, batch_size=batch_size, grad_accum=accum, opt='momentum', weight_decay=0.,
                                output=str(tmp_path / str(accum))), CPU)
        trainer.model.eval()
        x, target = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10
        for part in range(accum):
            share = slice(part * batch_size, (part + 1) * batch_size)
            trainer._step(x[share], target[share], accum, update=part + 1 == accum)
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b)


def test_cached_evaluation_batches_equal_the_loader_s(image_folder):
    config = resolve_data_config({'input_size': (3, 12, 12), 'crop_pct': 1.0}, pretrained_cfg={'num_classes': 2})
    batches = []
    for cache in (False, True):
        dataset = open_dataset('folder', str(image_folder), 'eval')
        loader = create_eval_loader(dataset, config, 5, CPU, workers=0, cache=cache)
        batches.append([torch.cat(parts) for parts in zip(*loader, strict=True)])
    for a, b in zip(*batches, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('world', [1, 2, 3])
def test_cached_evaluation_shards_cover_every_image_once(image_folder, world):
    config = resolve_data_config({'input_size': (3, 12, 12)}, pretrained_cfg={})
    loaders = [CachedLoader(open_dataset('folder', str(image_folder), 'eval'), config, 3, CPU, rank=r, world=world)
               for r in range(world)]
    images = torch.cat([x for loader in loaders for x, _ in loader])
    assert len(images) == 16 and len(images.flatten(1).unique(dim=0)) == 16
    assert all(len(list(loader)) == len(loader) for loader in loaders)


def test_cached_training_epochs_differ_and_have_full_batches(image_folder):
    config = resolve_data_config({'input_size': (3, 12, 12)}, pretrained_cfg={})
    loader = CachedLoader(open_dataset('folder', str(image_folder), 'train'), config, 10, CPU, shuffle=True, hflip=0.5)
    first, second = ([x for x, _ in loader] for _ in range(2))
    assert [len(x) for x in first] == [10, 10, 10, 10] and len(loader) == 4
    assert not torch.equal(first[0], second[0])


def test_a_shifted_crop_is_a_part_of_the_zero_padded_image():
    x = torch.randint(1, 255, (25, 3, 7, 5), dtype=torch.uint8)
    shifts = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    for image, (i, j), result in zip(padded, shifts.tolist(), shifted_crop(x, shifts, 2), strict=True):
        assert torch.equal(image[:, i:i + 7, j:j + 5], result)


def test_cached_training_shifts_images_in_every_direction(image_folder):
    config = resolve_data_config({'input_size': (3, 12, 12), 'mean': (0.,) * 3, 'std': (1.,) * 3}, pretrained_cfg={})
    dataset = open_dataset('folder', str(image_folder), 'train')
    loader = CachedLoader(dataset, config, 8, CPU, shuffle=True, padding=2)
    padded = torch.nn.functional.pad(loader.images, (2, 2, 2, 2))
    found = set()
    for _ in range(5):
        for result in torch.cat([255 * x for x, _ in loader]).round().to(torch.uint8):
            windows = {(i, j): (padded[:, :, i:i + 12, j:j + 12] == result).flatten(1).all(1).any()
                       for i in range(5) for j in range(5)}
            assert any(windows.values())
            found |= {shift for shift, equal in windows.items() if equal}
    assert len(found) > 15  # all 25 are equally likely


def test_balanced_subset_takes_classes_evenly():
    dataset = open_dataset('digits', None, 'train', limit=50)
    assert sorted(dataset.targets) == [c for c in range(10) for _ in range(5)]
    assert len(dataset) == 50


def test_labels_are_class_folders(image_folder, tmp_path):
    """timm's reader makes a class '' of images that lie in none, which shifts all others by one."""
    shutil.copytree(image_folder, tmp_path / 'data')
    image = tmp_path / 'data' / 'test' / 'down' / '000.png'
    shutil.copy(image, tmp_path / 'data' / 'test' / 'stray.png')
    with pytest.raises(SplitError, match=r'stray\.png lies in no class folder'):
        open_dataset('folder', str(tmp_path / 'data'), 'eval')
    assert len(open_dataset('folder', str(tmp_path / 'data'), 'eval', labels=False)) == 17
    shutil.copytree(image.parent, tmp_path / 'flat')
    assert len(open_dataset('folder', str(tmp_path / 'flat'), 'train', labels=False)) == 8
    (tmp_path / 'flat' / 'val').mkdir()  # what is to evaluate calibrates nothing
    with pytest.raises(SplitError, match='no train/ folder'):
        open_dataset('folder', str(tmp_path / 'flat'), 'train', labels=False)


def test_digits_are_split_without_overlap():
    train_set, eval_set = (open_dataset('digits', None, split, img_size=8) for split in ('train', 'eval'))
    assert (len(train_set), len(eval_set)) == (1437, 360)
    assert len({im.tobytes() for im in eval_set.images} & {im.tobytes() for im in train_set.images}) == 0


def test_regularizer_schedule_follows_the_updates(tmp_path):
    trainer = Trainer(small(tmp_path, epochs=2, reg=['basis_ortho=10:linear']), CPU)
    seen = []
    for update in (0, 4, 6):
        trainer.updates = update
        trainer._step(torch.randn(4, 3, 8, 8), torch.arange(4), 1, update=False)
        seen.append(trainer.task.regularizers[0].scheduled_weight)
    assert seen == pytest.approx([10, 5, 2.5])  # 4 updates an epoch


@pytest.mark.parametrize('name', list_configs())
def test_shipped_configs_are_valid(name):
    config = TrainConfig.from_args({**load_yaml(name), 'data_dir': 'somewhere'})
    assert isinstance(config.lr, float) and config.model and CONFIGS.joinpath(f'{name}.yaml').read_text()[0] == '#'


def test_yaml_scientific_notation_is_a_number(tmp_path):
    (tmp_path / 'c.yaml').write_text('model: resnet20_cifar\nweight-decay: 5e-4\nlr: 1e-1\n')
    config = TrainConfig.from_args(load_yaml(str(tmp_path / 'c.yaml')))
    assert (config.weight_decay, config.lr) == (5e-4, 0.1)


@pytest.mark.parametrize('settings, message', [
    (dict(modle='x'), "Unknown setting 'modle'"),
    (dict(epochs=0), 'epochs must be a whole number of at least 1 and at most 1,000,000, got 0'),
    (dict(lr='fast'), "lr must be a number of at least 0, got 'fast'"),
    (dict(cache='yes'), "cache must be true or false, got 'yes'"),
    (dict(aug='flip'), 'aug must be one of'),
    (dict(cache=True, aug='rrc'), '--cache augments on the device'),
    (dict(mixup=0.1, batch_size=7), 'batch_size must be even, got 7'),
    (dict(data='folder'), "needs --data-dir"),
    (dict(model=''), 'No model given'),
])
def test_bad_settings_are_named(settings, message):
    with pytest.raises(LeanError, match=message):
        TrainConfig.from_args({'model': 'resnet20_cifar', **settings})


def test_existing_run_is_not_overwritten(tmp_path):
    train(small(tmp_path))
    with pytest.raises(LeanError, match='already holds a run'):
        train(small(tmp_path))


def test_resuming_with_another_model_is_refused(tmp_path):
    train(small(tmp_path))
    other = small(tmp_path, resume=True, epochs=2)
    with pytest.raises(LeanError, match='is from another model'):
        train(replace(other, model_args={**other.model_args, 'shared_rank': 2}))


def test_diverged_training_stops_with_the_reason(tmp_path):
    with pytest.raises(LeanError, match=r'The loss is (nan|inf)'):
        train(small(tmp_path, lr=1e30, epochs=3, warmup_epochs=0))


def test_fine_tuning_keeps_structure_and_swaps_the_head(tmp_path, image_folder):
    train(small(tmp_path))
    source = str(tmp_path / 'run' / 'best.safetensors')
    config = TrainConfig(
        model=source, data_dir=str(image_folder), epochs=1, batch_size=16, cache=True, device='cpu',
        output=str(tmp_path / 'tuned'), lr=0.)
    train(config)
    tuned, base = load_model(tmp_path / 'tuned' / 'last.safetensors'), load_model(source)
    assert tuned.num_classes == 2 and tuned.pretrained_cfg['label_names'] == ['across', 'down']
    assert torch.equal(tuned.layer1[1].conv1.basis.weight, base.layer1[1].conv1.basis.weight)




def test_conv_similarity_initialization_precedes_training_and_reaches_the_ema(tmp_path, capsys):
    config = small(tmp_path, init='conv_similarity', init_steps=5, ema=True)
    trainer = Trainer(config, CPU)
    before = Trainer(replace(config, init='', output=str(tmp_path / 'plain')), CPU)
    printed = capsys.readouterr().out
    first, last = (float(v) for v in printed.split('initialization: ')[1].split(' in ')[0].split(' -> '))
    assert last < first and 'in 5 steps' in printed
    weight, ema = (trainer.task.get_trainable_module(ema=e).state_dict()['layer1.0.conv1.weight' if not e else
                   'module.layer1.0.conv1.weight'] for e in (False, True))
    assert torch.equal(weight, ema)
    assert not torch.equal(weight, before.model.layer1[0].conv1.weight)


@pytest.mark.parametrize('cache', [False, True])
def test_a_gray_model_is_trained_validated_and_asked_as_it_was_made(cache, tmp_path, capsys):
    from sklearn.datasets import load_digits

    from timm_lean_cli import main
    train(TrainConfig(model='resnet20_cifar', model_args={'in_chans': 1}, img_size=8, epochs=1, train_images=200,
                      batch_size=50, cache=cache, workers=0, device='cpu', output=str(tmp_path / 'run')))
    checkpoint = tmp_path / 'run' / 'last.safetensors'
    model = load_model(checkpoint)
    cfg = model.pretrained_cfg
    assert model.conv1.in_channels == cfg['input_size'][0] == len(cfg['mean']) == len(cfg['std']) == 1
    capsys.readouterr()
    assert main(['validate', str(checkpoint), '--workers', '0', '--json']) == 0
    with open(tmp_path / 'run' / 'summary.csv') as f:
        seen = float(list(csv.DictReader(f))[-1]['eval_top1'])
    assert json.loads(capsys.readouterr().out)['top1'] == pytest.approx(seen, abs=0.3)  # cached images are 8-bit
    Image.fromarray((load_digits().images[0] * 15.9).astype('uint8')).save(tmp_path / 'digit.png')
    assert main(['predict', str(checkpoint), str(tmp_path / 'digit.png')]) == 0
