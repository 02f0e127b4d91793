"""KernelPruningHook in real training runs of a tiny detector."""
import types

import pytest
import torch
from mmdet_support import SHARED, batch, predictions_of, scenes_config
from mmengine.hooks import EMAHook
from mmengine.runner import Runner

from timm_lean import LeanError
from timm_lean.mmdet import KernelPruningHook, export_detector, load_detector
from timm_lean.mmdet.detector import save_detector
from timm_lean.mmdet.weights import detector_header, load_from_safetensors
from timm_lean.pruning import kernel_report
from timm_lean.pruning.report import LayerReport


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


def test_files_shrink_and_load_to_the_bit(tmp_path, caplog):
    """With 80 % of all kernels zero; the classifying file stores live kernels alone, and so does the detector's."""
    trained(config(tmp_path, hook(amount=0.8, target='', scope='layer', min_keep=0), epochs=1))
    last = tmp_path / 'run' / 'last.safetensors'
    model = load_detector(last)
    plain = torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=False)['state_dict']
    for name, value in model.state_dict().items():
        assert torch.equal(value, plain[name.replace(".net.model.", ".net.")]), name
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    convolutions = sum(4 * m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    assert last.stat().st_size < size - 0.7 * convolutions
    # a loaded one that loses a part of its zeros is saved with a warning
    *_, conv = (m for m in model.backbone.modules() if isinstance(m, torch.nn.Conv2d))
    before = kernel_report(model.backbone).pruned
    lost = int((conv.weight == 0).flatten(2).all(2).sum())
    conv.weight.data[conv.weight == 0] = 1e-3
    with caplog.at_level('WARNING'):
        save_detector(model, tmp_path / 'lost.safetensors', detector_header(last))
    assert f'{100 * lost / before:.0f} % of the kernels' in caplog.text and 0 < lost < before
    # and stays so when it is exported
    folder = export_detector(None, last, tmp_path / 'folder')
    assert (folder / 'model.safetensors').stat().st_size < size - 0.7 * convolutions


@pytest.mark.slow
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
    saved = load_from_safetensors(str(tmp_path / 'parts' / 'run' / 'last.safetensors'))['state_dict']
    weight = saved['backbone.net.layer1.0.conv1.weight']
    assert torch.equal(weight, resumed.model.backbone.net.layer1[0].conv1.weight)


@pytest.mark.parametrize('hooks, message', [
    ([hook(amount=0.5), hook(threshold=1e-4)], 'twice'),
    ([hook(amount=0.5, target='spine')], "has no 'spine'.*backbone"),
    ([hook(criterion='eigen', amount=0.5)], 'Unknown pruning criterion'),
    ([hook()], "no kernel in target='backbone' is zero.*exactly one of"),
    ([hook(amount=1.)], 'at least 0 and below 1'),
    ([hook(amount=0.5, begin=2)], 'does not fit into the 2 epochs'),
    ([hook(amount=0.5, sparsity=1)], 'sparsity'),
])
def test_bad_hooks_are_clear_errors(tmp_path, hooks, message):
    with pytest.raises(LeanError, match=message):
        trained(config(tmp_path, *hooks))


@pytest.mark.slow
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


def test_a_pruned_detector_trains_with_its_zeros(tmp_path, caplog):
    """By a hook without a rule. Where training revived them all, the file's writer says so."""
    trained(config(tmp_path, hook(amount=0.5), epochs=1))
    cfg = config(tmp_path / 'tuned', hook(), dict(type='EMAHook', momentum=0.5), epochs=1)
    pruned = str(tmp_path / 'run' / 'last.safetensors')
    cfg.model.backbone = dict(type='timm_lean.TimmBackbone', checkpoint=pruned, out_indices=(2, 3, 4))
    tuned, last = trained(cfg).model, tmp_path / 'tuned' / 'run' / 'last.safetensors'
    assert [zero_share(model) for model in (tuned, load_detector(last))] == pytest.approx([0.5] * 2, abs=0.01)
    assert 'revived' not in caplog.text
    for parameter in tuned.parameters():
        torch.nn.init.ones_(parameter)
    save_detector(tuned, tmp_path / 'm.safetensors', detector_header(last))
    assert 'training revived them. Keep them' in caplog.text and 'KernelPruningHook()' in caplog.text


@pytest.mark.slow
def test_the_best_is_as_small_as_the_last(tmp_path):
    """Each evaluation scores less than the one before, and the detector is pruned in the second of three epochs."""
    cfg = scenes_config(tmp_path, SHARED, epochs=3)
    cfg.custom_hooks = [hook(amount=0.5, begin=1), dict(type='timm_lean.SafetensorsHook', metric='falling')]
    runner = Runner.from_cfg(cfg)
    scores = iter([0.9, 0.5, 0.4])
    runner.val_loop.evaluator.evaluate = lambda size: {'falling': next(scores)}
    runner.train()
    header = detector_header(tmp_path / 'run' / 'best.safetensors')
    assert (header['epoch'], header['score'], header['prunings']) == (2, 0.5, 1)
    assert zero_share(load_detector(tmp_path / 'run' / 'best.safetensors')) == pytest.approx(0.5, abs=0.01)
    # killed between the pruning and the next evaluation: the best on disk is still the one from before
    save_detector(load_detector(tmp_path / 'run' / 'best.safetensors'), tmp_path / 'run' / 'best.safetensors',
                  {**header, 'score': 0.99, 'prunings': 0})
    cfg = scenes_config(tmp_path, SHARED, epochs=4)
    cfg.custom_hooks = runner.cfg.custom_hooks
    cfg.resume = True
    runner = Runner.from_cfg(cfg)
    runner.val_loop.evaluator.evaluate = lambda size: {'falling': 0.3}
    runner.train()
    assert detector_header(tmp_path / 'run' / 'best.safetensors')['score'] == 0.3


@pytest.mark.slow
def test_a_best_from_before_the_pruning_is_told(tmp_path, caplog):
    cfg = scenes_config(tmp_path, SHARED, epochs=2)
    cfg.train_cfg.val_interval = 1
    cfg.custom_hooks = [hook(amount=0.5, begin=1), dict(type='timm_lean.SafetensorsHook')]
    runner = Runner.from_cfg(cfg)
    warnings = []
    runner.logger.warning = lambda text, *args: warnings.append(text)
    runner.train_loop.val_begin, evaluate = 1, runner.val_loop.evaluator.evaluate
    runner.val_loop.evaluator.evaluate = lambda size: evaluate(size) if runner.epoch == 1 else {}
    runner.train()
    assert any('from before the pruning ended' in text for text in warnings)


def test_shares_of_the_parts_are_logged():
    """A neck of weights that are all small loses far more than the amount, by a global ranking."""
    lines = {'info': [], 'warning': []}

    class Log:
        info, warning = lines['info'].append, lines['warning'].append

    layers = [('backbone.a', 10), ('backbone.b', 20), ('neck.c', 30), ('bbox_head.d', 96)]
    report = types.SimpleNamespace(
        layers=[LayerReport(name, (10, 10, 3, 3), pruned, 0) for name, pruned in layers], share=0.39)
    KernelPruningHook(amount=0.39)._tell(Log, report)
    assert lines['info'] == [
        'KernelPruningHook: 39.0 % of the kernels are zero (backbone 15.0 %, neck 30.0 %, bbox_head 96.0 %)']
    warning, = lines['warning']
    assert 'bbox_head has lost 96.0 %' in warning and "scope='layer'" in warning
