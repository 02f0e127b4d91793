"""Shared by the MMDetection tests: skips them where it is not installed, small configs and batches."""
# ruff: noqa: E402  (the plugin has to come before what it prepares)
import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for package in ('mmengine', 'mmcv', 'mmdet'):
    pytest.importorskip(package)

import timm_lean.mmdet

ROOT = Path(timm_lean.mmdet.__file__).parents[2]

from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine import config as mmengine_config
from mmengine.config import Config
from mmengine.structures import InstanceData

from timm_lean.mmdet.detector import build_detector
from timm_lean.mmdet.settings import open_config, set_data_root

from conftest import randomize_batchnorm  # isort: skip

CONFIGS = ROOT / 'mmdet_configs'
TOOLS = ROOT / 'tools'
SHARED = CONFIGS / 'scenes' / 'retinanet_resnet34_s8u1_scenes.py'
DENSE = CONFIGS / 'scenes' / 'retinanet_resnet34_scenes.py'

NATIVE = """
default_scope = 'mmdet'
work_dir = '{folder}/run'
custom_imports = dict(imports=['timm_lean.mmdet'], allow_failed_imports=False)
log_level = 'ERROR'
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(type='DetDataPreprocessor', mean=[120., 120., 120.], std=[60., 60., 60.], bgr_to_rgb=True,
                           pad_size_divisor=32),
    backbone=dict(type='ResNet', depth=18, base_channels=16, num_stages=4, out_indices=(1, 2, 3), style='pytorch'),
    neck=dict(type='FPN', in_channels=[32, 64, 128], out_channels=16, num_outs=4),
    bbox_head=dict(
        type='RetinaHead', num_classes=10, in_channels=16, feat_channels=16, stacked_convs=2,
        anchor_generator=dict(type='AnchorGenerator', octave_base_scale=3, scales_per_octave=1, ratios=[1.0],
                              strides=[8, 16, 32, 64]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True), loss_bbox=dict(type='L1Loss')),
    train_cfg=dict(assigner=dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0,
                                 ignore_iof_thr=-1), sampler=dict(type='PseudoSampler'), allowed_border=-1,
                   pos_weight=-1, debug=False),
    test_cfg=dict(nms_pre=100, min_bbox_size=0, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5),
                  max_per_img=10))
pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
            dict(type='Resize', scale=(64, 64), keep_ratio=True),
            dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='timm_lean.DigitScenes', data_root='{folder}/data', split='train', size=64,
                 counts=dict(train=8, val=4), pipeline=pipeline))
test_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='timm_lean.DigitScenes', data_root='{folder}/data', split='val', size=64,
                 counts=dict(train=8, val=4), test_mode=True, pipeline=pipeline))
test_evaluator = dict(type='CocoMetric', ann_file='{folder}/data/annotations/val.json', metric='bbox')
test_cfg = dict(type='TestLoop')
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1, val_interval=10)
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
custom_hooks = [dict(type='timm_lean.SafetensorsHook')]
"""
"""A tiny RetinaNet of MMDetection's own parts on tiny scenes, `{folder}` to be filled in."""

register_all_modules(init_default_scope=True)
# A run prints and writes its config twice, and to make it pretty takes longer than to build the detector.
mmengine_config.config.FormatCode = lambda text, **kwargs: (text, True)


def scenes_config(folder: Path, path: Path = SHARED, epochs: int = 1) -> Config:
    """A scenes config that trains a few iterations on tiny scenes in seconds."""
    cfg = open_config(path)
    set_data_root(cfg, folder / 'data')
    cfg.work_dir = str(folder / 'run')
    cfg.log_level = 'ERROR'
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.batch_size = 4
        loader.dataset.update(size=64, counts=dict(train=8, val=4))
    for pipeline in (cfg.val_dataloader.dataset.pipeline, cfg.test_dataloader.dataset.pipeline):
        pipeline[1].scale = (64, 64)
    backbone = cfg.model.backbone
    backbone.model_args.update(channels=(8, 16, 24, 32), layers=(2, 2, 2, 2))
    if 'shared_rank' in backbone.model_args:
        backbone.model_args.shared_rank = 4
    cfg.train_cfg.update(max_epochs=epochs, val_interval=1)
    cfg.param_scheduler = []
    cfg.model.test_cfg.update(score_thr=0., max_per_img=10)  # there is something to evaluate after two iterations too
    return cfg


def option_list(folder: Path, epochs: int = 1) -> list[str]:
    """`--cfg-options` with the effect of `scenes_config`."""
    options = ['train_cfg.val_interval=1', f'train_cfg.max_epochs={epochs}', 'param_scheduler=[]',
               'model.backbone.model_args.channels=(8,16,24,32)', 'model.backbone.model_args.layers=(2,2,2,2)',
               'model.backbone.model_args.shared_rank=4', 'model.test_cfg.score_thr=0', 'model.test_cfg.max_per_img=10',
               'log_level=ERROR']
    for split in ('train', 'val', 'test'):
        options += [f'{split}_dataloader.batch_size=4', f'{split}_dataloader.dataset.size=64',
                    f'{split}_dataloader.dataset.counts.train=8', f'{split}_dataloader.dataset.counts.val=4']
    return ['--work-dir', str(folder / 'run'), '--data-root', str(folder / 'data'), '--cfg-options', *options]


def batch(size: int, classes: int = 3, with_masks: bool = False) -> dict[str, list[Any]]:
    """Two random images with two boxes (and masks) each, before the data preprocessor."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(2):
        low = rng.uniform(0, size * 0.4, (2, 2))
        boxes = np.concatenate((low, low + rng.uniform(size * 0.25, size * 0.55, (2, 2))), axis=1).astype(np.float32)
        sample = DetDataSample(metainfo=dict(
            img_shape=(size, size), ori_shape=(size, size), batch_input_shape=(size, size), pad_shape=(size, size),
            scale_factor=(1.0, 1.0), img_id=0, img_path='', flip=False))
        sample.gt_instances = InstanceData(
            bboxes=torch.from_numpy(boxes), labels=torch.from_numpy(rng.integers(0, classes, 2)))
        if with_masks:
            masks = np.zeros((2, size, size), dtype=np.uint8)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
                mask[y1:y2, x1:x2] = 1
            sample.gt_instances.masks = BitmapMasks(masks, size, size)
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(sample)
    return dict(
        inputs=[torch.from_numpy(rng.integers(0, 256, (3, size, size), dtype=np.uint8)) for _ in samples],
        data_samples=samples)


def losses_of(model: Any, data: dict[str, list[Any]]) -> dict[str, Any]:
    """The losses of one training forward pass."""
    model.train()
    return model(**model.data_preprocessor(copy.deepcopy(data), training=True), mode='loss')


def predictions_of(model: Any, data: dict[str, list[Any]]) -> list[Any]:
    """The predictions for a batch, in eval mode."""
    model.eval()
    with torch.no_grad():
        return model(**model.data_preprocessor(copy.deepcopy(data), training=False), mode='predict')


def write_native(folder: Path) -> Path:
    """A small detector of MMDetection's own parts, as its model zoo gives them: `config.py` and `zoo.pth`."""
    (folder / 'config.py').write_text(NATIVE.format(folder=folder))
    torch.manual_seed(0)
    model = randomize_batchnorm(build_detector(Config.fromfile(str(folder / 'config.py'))))
    torch.save({'state_dict': model.state_dict(), 'meta': {'dataset_meta': {'CLASSES': tuple('0123456789')}}},
               folder / 'zoo.pth')
    return folder
