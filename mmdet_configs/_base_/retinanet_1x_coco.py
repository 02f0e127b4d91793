"""RetinaNet on COCO with a timm backbone: 12 epochs, mixed precision.

The backbone starts from scratch, as nothing is downloaded. With ImageNet weights of your own:
`--cfg-options model.backbone.checkpoint=FILE model.backbone.frozen_stages=1 model.backbone.norm_eval=True`.
"""
_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['timm_lean.mmdet'], allow_failed_imports=False)
model = dict(
    backbone=dict(_delete_=True, type='timm_lean.TimmBackbone', model_name='resnet50', out_indices=(1, 2, 3, 4)),
    neck=dict(in_channels='auto'))
optim_wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')
custom_hooks = [dict(type='timm_lean.SafetensorsHook')]
