"""The mends of mmengine and mmdet: checkpoints load and stay safe, SSD predicts, Python lacks `pkgutil.find_loader`."""

# ruff: noqa: E402  (the stand-in has to be in place before anything imports mmcv.ops)
from __future__ import annotations

import os
import pkgutil
import types
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip('mmcv')
pytest.importorskip('mmdet')

from timm_lean import mmcv_ext as ops
from timm_lean.mmdet import compat

ops.install()
compat.apply()

from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.runner import Runner, checkpoint, load_checkpoint


class Line(BaseModel):
    """The smallest model a Runner trains."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, mode: str = 'tensor') -> dict[str, torch.Tensor]:
        return dict(loss=self.linear(x).pow(2).mean())


def train(work_dir: Path, epochs: int, resume: bool = False) -> Runner:
    """Train with a log, a schedule, momentum and an EMA, so that the checkpoint holds what checkpoints hold."""
    runner = Runner(
        Line(),
        work_dir=str(work_dir),
        train_dataloader=DataLoader([dict(x=torch.ones(2)) for _ in range(8)], batch_size=4),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        param_scheduler=[dict(type='MultiStepLR', milestones=[1])],
        custom_hooks=[dict(type='EMAHook')],
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        resume=resume,
        experiment_name=f'{work_dir.name}-{epochs}',
        log_level='ERROR',
    )
    runner.train()
    return runner


def test_runner_resumes_from_its_own_checkpoint(tmp_path: Path) -> None:
    trained = train(tmp_path, 1)
    runner = train(tmp_path, 2, resume=True)
    assert runner.epoch == 2 and runner.iter == 4
    logged = runner.message_hub.log_scalars['train/loss']
    assert isinstance(logged, HistoryBuffer) and len(logged.data[0]) == 4
    assert logged.min() <= logged.mean() <= logged.max()
    model = Line()
    load_checkpoint(model, str(tmp_path / 'epoch_1.pth'))
    stored = torch.load(tmp_path / 'epoch_1.pth', weights_only=False)['state_dict']
    torch.testing.assert_close(dict(model.state_dict()), dict(stored))
    assert trained.work_dir == runner.work_dir


class Attack:
    """Pickles to a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def test_checkpoints_cannot_run_code(tmp_path: Path) -> None:
    for number, attack in enumerate(
        [
            Attack(os.system, f"touch {tmp_path / 'harm'}"),
            Attack(getattr, HistoryBuffer, '__init__'),
            Attack(getattr, np.ndarray, 'min'),
        ]
    ):
        file = str(tmp_path / f'{number}.pth')
        torch.save(dict(state_dict=Line().state_dict(), meta=attack), file)
        with pytest.raises(Exception, match=r"Weights only load failed|none of a log's statistics"):
            load_checkpoint(Line(), file)
    assert not (tmp_path / 'harm').exists()


def test_log_is_allowed_only_while_mmengine_loads(tmp_path: Path) -> None:
    file = str(tmp_path / 'log.pth')
    torch.save(dict(state_dict=Line().state_dict(), message_hub=HistoryBuffer([1.0], [1])), file)
    load_checkpoint(Line(), file)
    with pytest.raises(Exception, match='Weights only load failed'):
        torch.load(file)


def test_mends_are_applied_once() -> None:
    before = checkpoint.CheckpointLoader.load_checkpoint.__func__
    assert compat.apply() == compat.apply()
    assert checkpoint.CheckpointLoader.load_checkpoint.__func__ is before
    assert {'mend_checkpoint_loading', 'mend_ssd_predict'} <= set(compat.apply())


def test_nothing_is_done_where_mmengine_handles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_checkpoint_of_later_mmengine(cls: type, filename: str) -> Any:
        return torch.load(filename, weights_only=False)

    later = classmethod(load_checkpoint_of_later_mmengine)
    monkeypatch.setattr(checkpoint.CheckpointLoader, 'load_checkpoint', later)
    monkeypatch.setattr(checkpoint, 'load_from_local', load_checkpoint_of_later_mmengine)
    assert not compat.mend_checkpoint_loading()
    assert checkpoint.CheckpointLoader.load_checkpoint.__func__ is load_checkpoint_of_later_mmengine


def test_ssd_head_has_no_custom_activation() -> None:
    from mmdet.models.dense_heads import SSDHead

    assert SSDHead.loss_cls is None


def test_python_without_find_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmcv.utils import ext_loader
    from mmengine.utils.dl_utils import misc

    for module in (ext_loader, misc):  # so that both are restored
        monkeypatch.setattr(module, 'pkgutil', types.SimpleNamespace())
    monkeypatch.delattr(pkgutil, 'find_loader', raising=False)
    with pytest.raises(AttributeError):
        ext_loader.check_ops_exist()
    assert compat.mend_find_loader()
    assert ext_loader.check_ops_exist() and misc.mmcv_full_available()


def test_train_and_eval_return_the_model():
    """Every class of MMDetection that has a `train` of its own; torch's convention is `return self`."""
    from mmdet.models.backbones import ResNet
    from mmdet.registry import MODELS
    model = ResNet(18)
    assert model.eval() is model and not model.training and model.train() is model and model.training
    with torch.device('meta'):
        for name in ('MobileNetV2', 'CSPDarknet', 'SSDVGG', 'HRNet'):
            extra = dict(depth=16) if name == 'SSDVGG' else {}
            if name == 'HRNet':
                stage = dict(num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(1,), num_channels=(4,))
                branches = {f'stage{n}': dict(
                    num_modules=1, num_branches=n, block='BASIC', num_blocks=(1,) * n, num_channels=(4,) * n)
                    for n in (2, 3, 4)}
                extra = dict(extra=dict(stage1=stage, **branches))
            kind = MODELS.get(name)
            assert kind(**extra).train() is not None, name


def test_configs_inherit_without_pkg_resources(monkeypatch, tmp_path):
    """setuptools 82 removed `pkg_resources`; with it the two ways give the same config."""
    import importlib.util
    import sys

    from mmengine.config import Config, config
    from mmengine.hub import hub

    path = tmp_path / 'inherits.py'
    path.write_text("_base_ = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'\n")
    expected = Config.fromfile(path).pretty_text if importlib.util.find_spec('pkg_resources') else None
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda n, *a: None if n == 'pkg_resources' else find(n, *a))
    monkeypatch.setitem(sys.modules, 'pkg_resources', None)
    for module, name in ((config, 'is_installed'), (config, 'get_installed_path'), (hub, 'get_installed_path'),
                         (hub, 'install_package')):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    assert compat.mend_config_inheritance()
    assert expected in (None, Config.fromfile(path).pretty_text)
    assert hub.get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py').model.backbone.depth == 18
    path.write_text("_base_ = 'mmseg::x/y.py'\n")
    with pytest.raises(ModuleNotFoundError, match='mmsegmentation is not installed'):
        Config.fromfile(path)


def test_only_mmdets_own_autocast_is_silenced():
    from mmdet.models.layers.se_layer import ChannelAttention
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        compat.silence_autocast()
        ChannelAttention(8)(torch.randn(1, 8, 4, 4))
        assert not [w for w in caught if 'autocast' in str(w.message)]
        torch.cuda.amp.autocast(enabled=False)
    assert [w for w in caught if 'autocast' in str(w.message)]
