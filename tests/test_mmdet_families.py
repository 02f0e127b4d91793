"""MMDetection's own configs, one per family, on the stand-in for `mmcv._ext`: a training step and a prediction each.

The networks are those of the configs with random weights in place of the pretrained ones (nothing is downloaded) on
small images. That shows that a family builds, that its losses are finite and reach the first layers, and that it
predicts; it does not show accuracy.
"""

# ruff: noqa: E402  (the stand-in has to be in place before anything imports mmcv.ops)
from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("mmcv")
pytest.importorskip("mmdet")

from timm_lean import mmcv_ext as ops
from timm_lean.mmdet import compat

ops.install()
compat.apply()

import mmengine.hub
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmdet.utils import register_all_modules
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData

FAST = (
    "retinanet/retinanet_r18_fpn_1x_coco",
    "rtmdet/rtmdet_tiny_8xb32-300e_coco",
    "faster_rcnn/faster-rcnn_r50_fpn_1x_coco",
)
"""Run by every test run; between them nms, batched nms and RoIAlign."""

SLOW = (
    "faster_rcnn/faster-rcnn_r50_fpn_soft-nms_1x_coco",
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco",
    "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco",
    "pisa/faster-rcnn_r50_fpn_pisa_1x_coco",
    "carafe/mask-rcnn_r50_fpn-carafe_1x_coco",
    "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco",
    "dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco",
    "guided_anchoring/ga-faster-rcnn_r50_fpn_1x_coco",
    "point_rend/point-rend_r50-caffe_fpn_ms-1x_coco",
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco",
    "atss/atss_r50_fpn_1x_coco",
    "gfl/gfl_r50_fpn_1x_coco",
    "paa/paa_r50_fpn_1x_coco",
    "tood/tood_r50_fpn_1x_coco",
    "ddod/ddod_r50_fpn_1x_coco",
    "vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco",
    "reppoints/reppoints-moment_r50_fpn_1x_coco",
    "yolo/yolov3_mobilenetv2_8xb24-320-300e_coco",
    "yolox/yolox_tiny_8xb8-300e_coco",
    "ssd/ssd300_coco",
    "centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco",
    "cornernet/cornernet_hourglass104_10xb5-crop511-210e-mstest_coco",
    "centripetalnet/centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco",
    "solov2/solov2_r50_fpn_1x_coco",
    "yolact/yolact_r50_1xb8-55e_coco",
    "detr/detr_r50_8xb2-150e_coco",
    "deformable_detr/deformable-detr_r50_16xb2-50e_coco",
    "dino/dino-4scale_r50_8xb2-12e_coco",
    "sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco",
)

AUTOCAST = (
    "retinanet/retinanet_r18_fpn_1x_coco",
    "carafe/mask-rcnn_r50_fpn-carafe_1x_coco",
    "dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco",
    "dcnv2/faster-rcnn_r50-mdconv-group4-c3-c5_fpn_1x_coco",
)

SIZES = {
    "ssd/ssd300_coco": 300,  # its last convolutions are not padded
    "dino/dino-4scale_r50_8xb2-12e_coco": 256,  # picks 900 cells
    "point_rend/point-rend_r50-caffe_fpn_ms-1x_coco": 64,  # slow
}
"""Side of the images where 128 pixels do not do."""

ONE_BY_ONE = ("guided_anchoring/ga-faster-rcnn_r50_fpn_1x_coco",)
"""Predict one image at a time: masked convolutions of mmcv take no batches."""

CLASSES = 3


def _without_downloads(cfg: Any) -> None:
    """Take pretrained weights out of a model config, in place."""
    if isinstance(cfg, dict):
        if isinstance(cfg.get("init_cfg"), dict) and cfg["init_cfg"].get("type") == "Pretrained":
            cfg["init_cfg"] = None
        if "pretrained" in cfg:
            cfg["pretrained"] = None
        for value in cfg.values():
            _without_downloads(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            _without_downloads(value)


def _batch(size: int, with_masks: bool) -> dict[str, list[Any]]:
    """Two images with two boxes (and masks) each, before the data preprocessor."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(2):
        low = rng.uniform(0, size * 0.4, (2, 2))
        boxes = np.concatenate((low, low + rng.uniform(size * 0.25, size * 0.55, (2, 2))), axis=1).astype(np.float32)
        masks = np.zeros((2, size, size), dtype=np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.astype(int), strict=True):
            mask[y1:y2, x1:x2] = 1
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(size, size),
                ori_shape=(size, size),
                batch_input_shape=(size, size),
                scale_factor=(1.0, 1.0),
                pad_shape=(size, size),
                border=np.array([0, size, 0, size], dtype=np.float32),
                img_id=0,
                img_path="",
                flip=False,
            )
        )
        sample.gt_instances = InstanceData(
            bboxes=torch.from_numpy(boxes),
            labels=torch.from_numpy(rng.integers(0, CLASSES, 2)),
        )
        if with_masks:
            sample.gt_instances.masks = BitmapMasks(masks, size, size)
        sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
        samples.append(sample)
    images = [torch.from_numpy(rng.integers(0, 256, (3, size, size), dtype=np.uint8)) for _ in samples]
    return dict(inputs=images, data_samples=samples)


def _check_family(name: str, dtype: torch.dtype | None = None) -> None:
    """Train a step, optionally under autocast, and predict.

    Args:
        name: Config below `mmdet/configs`, without suffix.
        dtype: Of the autocast; None for float32.
    """
    torch.manual_seed(0)
    register_all_modules(init_default_scope=True)
    # YOLOX, TOOD and DINO read the progress of training, which a Runner would keep here.
    hub = MessageHub.get_current_instance()
    hub.update_info("iter", 0)
    hub.update_info("epoch", 0)
    hub.update_info("max_epochs", 1)

    config = mmengine.hub.get_config(f"mmdet::{name}.py").model
    _without_downloads(config)
    model = MODELS.build(config)
    model.init_weights()

    batch = _batch(SIZES.get(name, 128), with_masks=config.data_preprocessor.get("pad_mask", False))
    model.train()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        losses = model(**model.data_preprocessor(copy.deepcopy(batch), training=True), mode="loss")
        loss, logged = model.parse_losses(losses)
    assert torch.isfinite(loss), logged
    assert loss.requires_grad
    loss.backward()
    for part, module in model.named_children():
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients), part
        assert not trained or any(gradient.any() for gradient in gradients), part

    model.eval()
    steps = [slice(0, 1), slice(1, 2)] if name in ONE_BY_ONE else [slice(0, 2)]
    predictions = []
    for step in steps:
        part_of_batch = {key: copy.deepcopy(values[step]) for key, values in batch.items()}
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            predictions += model(**model.data_preprocessor(part_of_batch, training=False), mode="predict")
    assert len(predictions) == 2
    for prediction in predictions:
        found = prediction.pred_instances
        assert found.bboxes.shape == (len(found), 4)
        assert len(found.scores) == len(found.labels) == len(found)
        assert torch.isfinite(found.scores).all()


@pytest.mark.parametrize("name", FAST)
def test_family_trains_and_predicts(name: str) -> None:
    _check_family(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_families_train_and_predict(name: str) -> None:
    _check_family(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", AUTOCAST)
def test_families_train_and_predict_under_autocast(name: str) -> None:
    _check_family(name, torch.bfloat16)
