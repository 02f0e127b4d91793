"""Faster R-CNN with ResNet-34, two bases of 48 shared filters per stage (doubling), 1 unique as backbone."""
_base_ = '../_base_/faster_rcnn_1x_coco.py'

model = dict(backbone=dict(model_name='resnet34_s48u1_dual'))
custom_hooks = [
    dict(type='timm_lean.RegularizerHook', regularizers=[dict(type='basis_ortho', weight=10)]),
    dict(type='timm_lean.SafetensorsHook'),
]
