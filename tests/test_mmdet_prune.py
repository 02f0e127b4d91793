"""Channel pruning of detectors with a timm backbone: the whole is cut, and the backbone knows its channels."""
import pytest
import torch
from mmdet.registry import MODELS
from mmdet_support import SHARED, batch, predictions_of, scenes_config
from mmengine.runner import Runner

from timm_lean import LeanError, prune_channels
from timm_lean.mmdet import lean_detector, load_detector
from timm_lean.mmdet.adopt import adopt_structure
from timm_lean.mmdet.detector import build_detector, describe, export_detector, save_detector, write_detector
from timm_lean_cli import main


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('det')
    cfg = scenes_config(folder, SHARED)
    torch.manual_seed(0)
    model = build_detector(cfg)
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)  # so that every channel is told from the others
            torch.nn.init.uniform_(m.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(m.running_var, 0.5, 1.5)
    path = folder / 'dense.safetensors'
    save_detector(model, path, describe(cfg, model, {'classes': [str(i) for i in range(10)]}))
    return path


@pytest.fixture(scope='module')
def pruned(trained, tmp_path_factory):
    """The detector with half the channels of its backbone, and its file."""
    model = lean_detector(load_detector(trained), prune_channels, pruning_ratio=0.5, round_to=4, target='backbone')
    path = tmp_path_factory.mktemp('pruned') / 'p.safetensors'
    write_detector(model, path)
    return model, path


def test_neck_keeps_the_columns_of_the_channels_that_stay(trained, pruned):
    old, new = load_detector(trained), pruned[0]
    for i, width in enumerate(new.backbone.out_channels):
        before, after = (m.neck.lateral_convs[i].conv.weight for m in (old, new))
        assert after.shape[1] == width < before.shape[1] and len(after) == len(before)
        where = [next(j for j in range(before.shape[1]) if torch.equal(before[:, j], column))
                 for column in after.unbind(1)]
        norms = [[m for name, m in model.backbone.net.named_modules()
                  if f'layer{i + 2}' in name and name.endswith('bn2')][-1] for model in (old, new)]
        for name in ('weight', 'running_mean', 'running_var'):
            assert torch.equal(getattr(norms[0], name)[where], getattr(norms[1], name))


def test_reloads_by_config(pruned):
    model, path = pruned
    again = load_detector(path)
    assert again.backbone.out_channels == model.backbone.out_channels
    data = batch(64, classes=10)
    for a, b in zip(predictions_of(again, data), predictions_of(model, data), strict=True):
        torch.testing.assert_close(a.pred_instances.scores, b.pred_instances.scores, rtol=0, atol=0)
    with pytest.raises(LeanError, match='changed as a whole'):
        MODELS.build(dict(type='timm_lean.TimmBackbone', checkpoint=str(path), out_indices=(2, 3, 4)))


def test_command(trained, tmp_path, capsys):
    folder = export_detector(None, trained, tmp_path / 'folder')
    out = tmp_path / 'c.safetensors'
    assert main(['prune', str(folder), '-o', str(out), '--granularity', 'channel', '--ratio', '0.5',
                 '--calibrate', '0']) == 0
    assert out.stat().st_size < trained.stat().st_size
    assert load_detector(out).backbone.out_channels < load_detector(trained).backbone.out_channels
    capsys.readouterr()
    assert main(['prune', str(out), '-o', str(tmp_path / 'd.safetensors'), '--granularity', 'channel']) == 2
    assert 'pruned by channels before' in capsys.readouterr().err


@pytest.mark.slow
def test_fine_tunes_by_its_own_config(pruned, tmp_path):
    model, path = pruned
    cfg = scenes_config(tmp_path, SHARED)
    adopt_structure(cfg, path)
    cfg.load_from = str(path)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.custom_hooks = [dict(type='timm_lean.SafetensorsHook')]
    runner = Runner.from_cfg(cfg)
    assert runner.model.backbone.out_channels == model.backbone.out_channels
    runner.train()
    tuned = load_detector(tmp_path / 'run' / 'last.safetensors')
    assert tuned.lean_steps == model.lean_steps
    assert not torch.equal(tuned.neck.lateral_convs[0].conv.weight, model.neck.lateral_convs[0].conv.weight)
    again = lean_detector(tuned, prune_channels, pruning_ratio=0.5, round_to=4)
    assert sum(again.backbone.out_channels) < sum(model.backbone.out_channels)
