"""KernelPruningHook in real training runs of a tiny detector."""
import pytest
import torch
from mmdet_support import SHARED, batch, predictions_of, scenes_config
from mmengine.hooks import EMAHook
from mmengine.runner import Runner
from safetensors import safe_open

from timm_lean import LeanError
from timm_lean.mmdet import KernelPruningHook, load_detector
from timm_lean.mmdet.weights import detector_header
from timm_lean.pruning import kernel_report


def hook(**kwargs):
    return dict(type='timm_lean.KernelPruningHook', **kwargs)


def config(folder, *hooks, epochs=2):
    cfg = scenes_config(folder, SHARED, epochs)
    cfg.custom_hooks = [*hooks, dict(type='timm_lean.SafetensorsHook')]
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    return cfg


def zero_share(model) -> float:
    return kernel_report(model.backbone).share


def trained(cfg):
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def test_masks_hold_in_the_average_and_in_the_files(tmp_path):
    cfg = config(tmp_path, hook(amount=0.6, schedule='linear', begin=0, end=2), dict(type='EMAHook', momentum=0.5))
    runner = trained(cfg)
    averaged = next(h for h in runner.hooks if isinstance(h, EMAHook)).ema_model.module
    for model in (runner.model, averaged):
        assert zero_share(model) == pytest.approx(0.6, abs=0.01)
    last = tmp_path / 'run' / 'last.safetensors'
    step, = detector_header(last)['backbone']['steps']
    assert (step['op'], step['amount']) == ('prune_kernels', 0.6)
    loaded = load_detector(last)
    assert zero_share(loaded) == pytest.approx(0.6, abs=0.01)
    data = batch(64, classes=10)
    for found, wanted in zip(predictions_of(loaded, data), predictions_of(averaged, data), strict=True):
        torch.testing.assert_close(found.pred_instances.scores, wanted.pred_instances.scores, rtol=0, atol=0)


def test_resuming_ends_at_the_same_weights(tmp_path):
    # two iterations an epoch: 0.25 from the second iteration on, 0.5 from the third
    pruning = hook(criterion='weight', amount=0.5, schedule='linear', begin=1, end=3, by_epoch=False)
    whole = trained(config(tmp_path / 'whole', pruning))
    cfg = config(tmp_path / 'parts', pruning, epochs=2)
    runner = Runner.from_cfg(cfg)
    runner.train_loop._max_epochs = 1  # as if killed after the first epoch
    runner.train()
    assert zero_share(runner.model) == pytest.approx(0.25, abs=0.01)
    cfg = config(tmp_path / 'parts', pruning)
    cfg.resume = True
    resumed = trained(cfg)
    assert zero_share(resumed.model) == pytest.approx(0.5, abs=0.01)
    hooks = [next(h for h in r.hooks if isinstance(h, KernelPruningHook)) for r in (whole, resumed)]
    assert hooks[0].pruner.updates == hooks[1].pruner.updates == 2
    with safe_open(tmp_path / 'parts' / 'run' / 'last.safetensors', 'pt') as f:
        weight = f.get_tensor('backbone.net.layer1.0.conv1.weight')
    assert torch.equal(weight, resumed.model.backbone.net.layer1[0].conv1.weight)


@pytest.mark.parametrize('hooks, message', [
    ([hook(amount=0.5), hook(threshold=1e-4)], 'twice'),
    ([hook(amount=0.5, target='spine')], "has no 'spine'.*backbone"),
    ([hook(criterion='eigen', amount=0.5)], 'Unknown pruning criterion'),
    ([hook()], 'exactly one of'),
    ([hook(amount=1.)], 'at least 0 and below 1'),
    ([hook(amount=0.5, begin=2)], 'does not fit into the 2 epochs'),
    ([hook(amount=0.5, sparsity=1)], 'sparsity'),
])
def test_bad_hooks_are_clear_errors(tmp_path, hooks, message):
    with pytest.raises(LeanError, match=message):
        trained(config(tmp_path, *hooks))


def test_a_pruned_detector_is_pruned_further_only_on_request(tmp_path):
    trained(config(tmp_path, hook(amount=0.5), epochs=1))
    pruned = str(tmp_path / 'run' / 'last.safetensors')

    def again(**kwargs):
        cfg = config(tmp_path / 'again', hook(amount=0.7, **kwargs), epochs=1)
        cfg.model.backbone = dict(type='timm_lean.TimmBackbone', checkpoint=pruned, out_indices=(2, 3, 4))
        return trained(cfg)

    with pytest.raises(LeanError, match='pruned before'):
        again()
    assert zero_share(again(again=True).model) == pytest.approx(0.7, abs=0.01)
