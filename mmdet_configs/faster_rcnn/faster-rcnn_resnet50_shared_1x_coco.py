"""Faster R-CNN with ResNet-50 with one shared 3 x 3 convolution per stage as backbone."""
_base_ = '../_base_/faster_rcnn_1x_coco.py'

model = dict(backbone=dict(model_name='resnet50_shared'))
custom_hooks = [
    dict(type='timm_lean.RegularizerHook', regularizers=[dict(type='basis_ortho', weight=10)]),
    dict(type='timm_lean.SafetensorsHook'),
]
