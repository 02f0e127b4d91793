"""Which backend, GPU and random numbers each process of a run takes; NCCL and GPUs are played by stand-ins.

Runs of two real processes, by gloo, are in the tests of the parts: training, calibration, entropy, models, detectors.
"""
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from timm_lean.training import TrainConfig, data, device, engine


@pytest.fixture
def second_of_two(monkeypatch):
    """The environment that torchrun gives the second of two processes; returns what torch was asked for."""
    asked = SimpleNamespace(backend=None, gpu=None)
    for name, value in dict(WORLD_SIZE=2, RANK=1, LOCAL_RANK=1).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda backend, **kwargs: vars(asked).update(
        backend=backend))
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: 2)
    monkeypatch.setattr(torch.distributed, 'get_rank', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda name: vars(asked).update(gpu=str(name)))
    monkeypatch.setattr(device, 'resolve_device', torch.device)
    return asked


@pytest.mark.parametrize('name, found, backend', [
    ('cuda', torch.device('cuda', 1), 'nccl'), ('cuda:0', torch.device('cuda', 1), 'nccl'),
    ('cpu', torch.device('cpu'), 'gloo')])
def test_gpus_talk_by_nccl_and_every_process_takes_its_own(name, found, backend, second_of_two):
    assert device.start_distributed(name) == (found, 1, 2)
    assert (second_of_two.backend, second_of_two.gpu) == (backend, str(found) if backend == 'nccl' else None)


def test_one_process_starts_no_group(monkeypatch):
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda **kwargs: pytest.fail('started'))
    assert device.start_distributed('cpu') == (torch.device('cpu'), 0, 1)


@pytest.mark.parametrize('where, ids', [(torch.device('cuda', 1), [1]), (torch.device('cpu'), None)])
def test_the_model_is_wrapped_for_the_gpu_of_the_process(where, ids, tmp_path, monkeypatch):
    """Everything before it is left out; on several processors `device_ids` must be None."""
    found = []

    class Trainer(engine.Trainer):
        def _open_data(self):
            return ['a', 'b']

        def _prepare_model(self, *args):
            pass

        def _prepare_task(self, regularizers):
            self.task = SimpleNamespace(prepare_distributed=lambda device_ids: found.append(device_ids))

        def _prepare_optimization(self):
            pass

        def _open_directory(self):
            return tmp_path

    config = TrainConfig(model='resnet20_cifar', model_args=dict(layers=[1, 1, 1]), data='digits', device='cpu')
    Trainer(config, where, rank=1, world=2)
    Trainer(config, where)
    assert found == [ids]


def numbers():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_processes_draw_different_numbers_and_the_same_again():
    found = {}
    for key in ((0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0), (0, 1, 0)):
        data.seed_epoch(*key)
        drawn = numbers()
        assert found.setdefault(key, drawn) == drawn
    for generator in zip(*found.values(), strict=True):
        assert len(set(generator)) == 4


@pytest.mark.parametrize('cache, rank', [(False, 1), (True, 0)])
def test_processes_of_a_run_augment_by_their_rank_but_share_the_order_of_cached_images(
        cache, rank, tmp_path, monkeypatch):
    """With the images in memory all processes draw one order, of which each takes its part."""
    config = TrainConfig(
        model='resnet20_cifar', model_args=dict(layers=[1, 1, 1], channels=[8, 8, 8]), data='digits', img_size=8,
        train_images=32, batch_size=16, workers=0, cache=cache, device='cpu', seed=7, output=str(tmp_path / 'run'))
    trainer = engine.Trainer(config, torch.device('cpu'))
    trainer.rank = 1
    seeds = []
    monkeypatch.setattr(engine, 'seed_epoch', lambda *args: seeds.append(args))
    trainer._train_epoch(4)
    assert seeds == [(7, 5, rank)]


def test_detectors_on_gpus_are_left_to_mmengine(monkeypatch):
    """Mixed precision stays, and MMEngine chooses the GPU and, by the config, NCCL."""
    support = pytest.importorskip('mmdet_support', exc_type=ImportError)
    from timm_lean.mmdet import fit_machine, launch
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda *args, **kwargs: pytest.fail('started'))
    monkeypatch.setattr(fit_machine, 'check_data', lambda *args: None)
    cfg = support.open_config(support.SHARED)
    cfg.launcher, cfg.optim_wrapper.type = 'pytorch', 'AmpOptimWrapper'
    launch.prepare(cfg, ('train', 'val'))
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper' and 'model_wrapper_cfg' not in cfg
    assert cfg.env_cfg.dist_cfg.backend == 'nccl'
