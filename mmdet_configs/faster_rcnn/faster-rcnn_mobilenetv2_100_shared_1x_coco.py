"""Faster R-CNN with MobileNetV2 with shared 1 x 1 expansions as backbone."""
_base_ = '../_base_/faster_rcnn_1x_coco.py'

model = dict(backbone=dict(model_name='mobilenetv2_100_shared'))
custom_hooks = [
    dict(type='timm_lean.RegularizerHook', regularizers=[dict(type='basis_ortho', weight=10)]),
    dict(type='timm_lean.SafetensorsHook'),
]
