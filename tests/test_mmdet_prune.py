"""Channel pruning of detectors: the neck gets the channels that stay, and the file reloads by config."""
import pytest
import torch
from mmdet.registry import MODELS
from mmdet_support import SHARED, batch, predictions_of, scenes_config
from mmengine.runner import Runner

from timm_lean import LeanError
from timm_lean.mmdet import load_detector
from timm_lean.mmdet.detector import build_detector, describe, export_detector, save_detector
from timm_lean.mmdet.prune import prune_detector
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


def last_norm(net, stage):
    return [m for name, m in net.named_modules() if stage in name and name.endswith('bn2')][-1]


def test_neck_keeps_the_columns_of_the_channels_that_stay(trained, tmp_path):
    old = load_detector(trained)
    new = prune_detector(trained, tmp_path / 'p.safetensors', pruning_ratio=0.5)
    for i, (stage, width) in enumerate(zip(('layer2', 'layer3', 'layer4'), new.backbone.out_channels, strict=True)):
        before, after = (m.neck.lateral_convs[i].conv.weight for m in (old, new))
        assert after.shape[1] == width < before.shape[1]
        where = [next(j for j in range(before.shape[1]) if torch.equal(before[:, j], column))
                 for column in after.unbind(1)]
        norms = [last_norm(m.backbone.net, stage) for m in (old, new)]
        for name in ('weight', 'running_mean', 'running_var'):
            assert torch.equal(getattr(norms[0], name)[where], getattr(norms[1], name))


def test_reloads_by_config(trained, tmp_path):
    out = tmp_path / 'p.safetensors'
    model = prune_detector(trained, out, pruning_ratio=0.25)
    again = load_detector(out)
    data = batch(64, classes=10)
    for a, b in zip(predictions_of(again, data), predictions_of(model, data), strict=True):
        torch.testing.assert_close(a.pred_instances.scores, b.pred_instances.scores, rtol=0, atol=0)
    backbone = MODELS.build(dict(type='timm_lean.TimmBackbone', checkpoint=str(out), out_indices=(2, 3, 4)))
    assert backbone.out_channels == model.backbone.out_channels
    with pytest.raises(LeanError, match='pruned by channels before'):
        prune_detector(out, tmp_path / 'q.safetensors')


def test_command(trained, tmp_path, capsys):
    folder = export_detector(None, trained, tmp_path / 'folder')
    for source in (trained, folder):
        out = tmp_path / 'c.safetensors'
        assert main(['prune', str(source), '-o', str(out), '--granularity', 'channel', '--ratio', '0.5']) in (0, None)
        assert out.stat().st_size < trained.stat().st_size
        assert load_detector(out).backbone.out_channels < load_detector(trained).backbone.out_channels
        out.unlink()
    capsys.readouterr()
    assert main(['prune', str(trained), '-o', str(out), '--amount', '0.5']) != 0
    error = capsys.readouterr().err
    assert '--granularity channel' in error and 'Traceback' not in error
    assert not out.exists()


@pytest.mark.slow
def test_fine_tunes_by_its_own_config(trained, tmp_path):
    out = tmp_path / 'p.safetensors'
    pruned = prune_detector(trained, out, pruning_ratio=0.5)
    cfg = scenes_config(tmp_path, SHARED)
    cfg.model.backbone.checkpoint = cfg.load_from = str(out)
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.custom_hooks = [dict(type='timm_lean.SafetensorsHook')]
    runner = Runner.from_cfg(cfg)
    assert runner.model.backbone.out_channels == pruned.backbone.out_channels
    runner.train()
    tuned = load_detector(tmp_path / 'run' / 'last.safetensors')
    assert tuned.backbone.out_channels == pruned.backbone.out_channels
    assert not torch.equal(tuned.neck.lateral_convs[0].conv.weight, pruned.neck.lateral_convs[0].conv.weight)
    with pytest.raises(LeanError, match='pruned by channels before'):
        prune_detector(tmp_path / 'run' / 'last.safetensors', tmp_path / 'q.safetensors')
    again = prune_detector(out, tmp_path / 'q.safetensors', pruning_ratio=0.5, round_to=4, again=True)
    assert sum(again.backbone.out_channels) < sum(pruned.backbone.out_channels)


def test_a_detector_without_a_neck_is_refused(trained, tmp_path, monkeypatch):
    model = load_detector(trained)
    model.neck = None
    monkeypatch.setattr('timm_lean.mmdet.prune.load_detector', lambda source, **kwargs: model)
    with pytest.raises(LeanError, match='no neck between backbone and heads'):
        prune_detector(trained, tmp_path / 'p.safetensors')
    assert not list(tmp_path.iterdir())
