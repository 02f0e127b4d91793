"""Shared-basis backbone on BCCD: one basis of 8 shared filters per stage (doubling), 1 unique (of 16 channels)."""
_base_ = '../_base_/retinanet_bccd.py'

model = dict(backbone=dict(
    _delete_=True, type='timm_lean.TimmBackbone', model_name='resnet34_s32u1', out_indices=(2, 3, 4),
    model_args=dict(channels=(16, 32, 64, 128), shared_rank=8)))
custom_hooks = [
    dict(type='timm_lean.RegularizerHook', regularizers=[dict(type='basis_ortho', weight=10)]),
    dict(type='timm_lean.SafetensorsHook'),
]
