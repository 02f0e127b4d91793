"""FCOS on COCO with a timm backbone: 12 epochs, mixed precision.

The backbone starts from scratch, as nothing is downloaded. With ImageNet weights of your own:
`--cfg-options model.backbone.checkpoint=FILE model.backbone.frozen_stages=1 model.backbone.norm_eval=True`.
"""
_base_ = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'

custom_imports = dict(imports=['timm_lean.mmdet'], allow_failed_imports=False)
model = dict(
    # the base is for weights of Caffe, with its own normalization
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(_delete_=True, type='timm_lean.TimmBackbone', model_name='resnet50', out_indices=(1, 2, 3, 4)),
    neck=dict(in_channels='auto'))
optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')
custom_hooks = [dict(type='timm_lean.SafetensorsHook')]
