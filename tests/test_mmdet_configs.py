"""Every config of `mmdet_configs/` builds, trains an iteration and predicts, on small random images."""
import os
import shutil
import subprocess
import sys

import pytest
import torch
from mmdet_support import CONFIGS, ROOT, batch, losses_of, open_config, predictions_of
from mmengine import hub

from timm_lean import LeanError
from timm_lean.mmdet import TimmBackbone
from timm_lean.mmdet.detector import build_detector

ALL = sorted(p for p in CONFIGS.glob('*/*.py') if p.parent.name != '_base_')
FAST = ('retinanet_resnet34_s8u1_bccd',)
SHARED_NAMES = ('s48u1', 's8u1', 'shared', 'sharedpp')


def cases():
    return [pytest.param(p, id=p.stem, marks=() if p.stem in FAST else pytest.mark.slow) for p in ALL]


@pytest.mark.parametrize('path', cases())
def test_config_trains_and_predicts(path):
    cfg = open_config(path)
    masks = path.parent.name == 'mask_rcnn'
    model = build_detector(cfg)
    assert isinstance(model.backbone, TimmBackbone) != path.stem.startswith('rtmdet')  # MMDetection's own
    model.init_weights()
    head = getattr(model, 'roi_head', model).bbox_head
    data = batch(128, classes=head.num_classes, with_masks=masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = next(model.backbone.parameters()).clone()
    loss, log = model.parse_losses(losses_of(model, data))
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss), log
    assert not torch.equal(before, next(model.backbone.parameters()))
    predictions = predictions_of(model, data)
    assert len(predictions) == 2
    for prediction in predictions:
        found = prediction.pred_instances
        assert found.bboxes.shape == (len(found), 4) and torch.isfinite(found.scores).all()
        assert not masks or found.masks.shape == (len(found), 128, 128)


@pytest.mark.parametrize('path', [pytest.param(p, id=p.stem) for p in ALL])
def test_shared_configs_have_the_regularizer(path):
    """Dense and shared differ in the backbone and in the regularizer only; one dense config is about a regularizer."""
    cfg = open_config(path)
    types = [hook['type'] for hook in cfg.custom_hooks]
    shared = any(name in path.stem.split('_') for name in (*SHARED_NAMES, 'similarity'))
    assert ('timm_lean.RegularizerHook' in types) == shared
    assert 'timm_lean.SafetensorsHook' in types
    assert cfg.custom_imports['imports'] == ['timm_lean.mmdet']
    if path.stem.endswith('1x_coco'):
        assert cfg.train_cfg.max_epochs == 12 and cfg.optim_wrapper.type == 'AmpOptimWrapper'


def test_every_shared_config_has_a_dense_counterpart():
    names = {p.stem for p in ALL}
    for detector in ('faster-rcnn', 'mask-rcnn', 'retinanet', 'fcos'):
        for shared, dense in (
                ('resnet34_s48u1_dual', 'resnet34'), ('resnet50_shared', 'resnet50'), ('resnet50_sharedpp', 'resnet50'),
                ('mobilenetv2_100_shared', 'mobilenetv2_100')):
            assert f'{detector}_{shared}_1x_coco' in names and f'{detector}_{dense}_1x_coco' in names


def test_dense_and_shared_scenes_have_the_same_shape():
    dense, shared = (build_detector(open_config(CONFIGS / 'scenes' / f'retinanet_resnet34{kind}_scenes.py'))
                     for kind in ('', '_s8u1'))
    assert dense.backbone.out_channels == shared.backbone.out_channels
    assert sum(p.numel() for p in shared.backbone.parameters()) < 0.6 * sum(
        p.numel() for p in dense.backbone.parameters())


def test_mmengine_opens_them_by_name():
    cfg = hub.get_config('timm_lean::bccd/retinanet_resnet34_bccd.py')
    assert cfg.model == open_config(CONFIGS / 'bccd' / 'retinanet_resnet34_bccd.py').model
    with pytest.raises(LeanError, match='no trained weights'):
        hub.get_config('timm_lean::bccd/retinanet_resnet34_bccd.py', pretrained=True)


@pytest.mark.slow
def test_a_wheel_carries_the_configs(tmp_path):
    """Built from a copy, as the build leaves files beside the sources."""
    pytest.importorskip('setuptools', minversion='77')  # older ones do not read this pyproject.toml
    for name in ('timm_lean', 'timm_lean_cli', 'mmdet_configs'):
        shutil.copytree(ROOT / name, tmp_path / 'source' / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'setup.py', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, tmp_path / 'source' / name)
    subprocess.run([sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', str(tmp_path / 'built')],
                   cwd=tmp_path / 'source', check=True, capture_output=True)
    folder = tmp_path / 'built' / 'timm_lean' / '.mim' / 'configs'
    assert sorted(p.relative_to(folder) for p in folder.rglob('*.py')) == sorted(
        p.relative_to(CONFIGS) for p in CONFIGS.rglob('*.py'))
    (tmp_path / 'mine.py').write_text("_base_ = 'timm_lean::bccd/retinanet_resnet34_bccd.py'")
    code = ("import timm_lean.mmdet\n"
            "from mmengine import Config, hub\n"
            "cfg = hub.get_config('timm_lean::bccd/retinanet_resnet34_bccd.py')\n"
            "assert Config.fromfile('mine.py').model == cfg.model\n"
            "print(cfg.filename)")
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=tmp_path,
                            env={**os.environ, 'PYTHONPATH': str(tmp_path / 'built')})
    assert result.stdout.strip() == str(folder / 'bccd' / 'retinanet_resnet34_bccd.py')
