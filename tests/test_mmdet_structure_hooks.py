"""ShareHook and ChannelPruningHook in real trainings of a tiny detector."""
import os

import pytest
import torch
from mmdet_support import NATIVE, batch, predictions_of
from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from timm_lean import LeanError
from timm_lean.mmdet import load_detector
from timm_lean.mmdet.detector import build_detector
from timm_lean.mmdet.fit_machine import prepare
from timm_lean_cli import detectors

SHARE = dict(type='timm_lean.ShareHook', params=0.8, target='backbone')
CHANNELS = dict(type='timm_lean.ChannelPruningHook', pruning_ratio=0.5, round_to=4)


def config(folder, *hooks, epochs=1, **values):
    path = folder / 'config.py'
    folder.mkdir(exist_ok=True)
    path.write_text(NATIVE.format(folder=folder))
    cfg = Config.fromfile(str(path))
    torch.manual_seed(0)
    torch.save({'state_dict': build_detector(cfg).state_dict(), 'meta': {}}, folder / 'start.pth')
    cfg.load_from = str(folder / 'start.pth')
    cfg.custom_hooks = [*hooks, dict(type='EMAHook', momentum=0.5), *cfg.custom_hooks]
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    cfg.param_scheduler = [dict(type='MultiStepLR', milestones=[1], by_epoch=False, gamma=0.1)]
    cfg.randomness = dict(seed=0)
    cfg.train_cfg.max_epochs = epochs
    cfg.merge_from_dict(values)
    return cfg


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A training of two iterations with both hooks."""
    folder = tmp_path_factory.mktemp('whole')
    runner = Runner.from_cfg(config(folder, SHARE, CHANNELS))
    start = parameters(runner.model)
    runner.train()
    return folder, runner, start


def test_structure_optimizer_average_and_files_go_together(whole):
    folder, runner, start = whole
    assert [step['op'] for step in runner.model.lean_steps] == ['share', 'resize']
    assert parameters(runner.model) < 0.5 * start
    optimized = {id(p) for group in runner.optim_wrapper.optimizer.param_groups for p in group['params']}
    assert optimized == {id(p) for p in runner.model.parameters()}
    assert runner.param_schedulers[0].optimizer is runner.optim_wrapper
    assert runner.optim_wrapper.get_lr()['lr'] == [pytest.approx(0.001)]  # 0.01, by the schedule a tenth
    averaged = next(hook for hook in runner.hooks if isinstance(hook, EMAHook)).ema_model.module
    loaded = load_detector(folder / 'run' / 'last.safetensors')
    for a, b in zip(predictions_of(loaded, batch(64)), predictions_of(averaged, batch(64)), strict=True):
        assert torch.equal(a.pred_instances.scores, b.pred_instances.scores)


@pytest.mark.slow
def test_resuming_ends_at_the_same_weights(tmp_path):
    whole = Runner.from_cfg(config(tmp_path / 'whole', SHARE, CHANNELS, epochs=2))
    whole.train()
    tmp_path /= 'parts'
    runner = Runner.from_cfg(config(tmp_path, SHARE, CHANNELS, epochs=2))
    runner.train_loop._max_epochs = 1  # as if killed after the first epoch
    runner.train()
    resumed = Runner.from_cfg(config(tmp_path, SHARE, CHANNELS, epochs=2, resume=True, load_from=None))
    resumed.train()
    assert resumed.model.lean_steps == whole.model.lean_steps
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.slow
def test_a_pth_of_such_a_training_is_tested_with_its_config(whole, tmp_path):
    folder = whole[0]
    assert detectors.test_main(
        [str(folder / 'config.py'), str(folder / 'run' / 'epoch_1.pth'), '--work-dir', str(tmp_path)]) == 0


def _train_one_of_two(rank, folder):
    torch.set_num_threads(1)
    os.environ['LOCAL_RANK'] = str(rank)
    torch.distributed.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2)
    cfg = Config.fromfile(str(folder / 'whole.py'))
    cfg.launcher = 'pytorch'
    prepare(cfg, ('train',))
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert is_model_wrapper(runner.model)
    detector = runner.model.module
    torch.save((detector.lean_steps, detector.state_dict()), folder / f'{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_one_new_structure(tmp_path):
    cfg = config(tmp_path, dict(SHARE, calibrate=8), CHANNELS)
    test = Config.fromfile(str(tmp_path / 'config.py'))  # whose pipeline prepares the images of a calibration
    cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = test.test_dataloader, test.test_evaluator, test.test_cfg
    cfg.dump(str(tmp_path / 'whole.py'))
    torch.multiprocessing.spawn(_train_one_of_two, (tmp_path,), nprocs=2)
    (steps, first), (others, second) = (torch.load(tmp_path / f'{rank}.pt') for rank in (0, 1))
    assert [step['op'] for step in steps] == ['share', 'resize'] and steps == others
    start = torch.load(tmp_path / 'start.pth')['state_dict']
    assert not torch.equal(first['bbox_head.retina_cls.bias'], start['bbox_head.retina_cls.bias'])
    for name, value in first.items():
        if 'running_' not in name:  # of each process's own images
            assert torch.equal(value, second[name]), name  # each saw other images: gradients were averaged


@pytest.mark.parametrize('hooks, values, message', [
    ([SHARE, SHARE], {}, 'twice'),
    ([dict(SHARE, target='spine')], {}, "has no 'spine'"),
    ([dict(SHARE, parms=1)], {}, "ShareHook has no argument 'parms'"),
    ([dict(CHANNELS, pruning_ratio=1.5)], {}, 'pruning_ratio must be above 0 and below 1'),
    ([dict(CHANNELS, calibrate=-1)], {}, 'calibrate must be a number of images'),
])
def test_bad_hooks_are_clear_errors(tmp_path, hooks, values, message):
    with pytest.raises(LeanError, match=message):
        Runner.from_cfg(config(tmp_path, *hooks, **values)).train()
