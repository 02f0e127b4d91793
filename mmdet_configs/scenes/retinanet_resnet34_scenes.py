"""The dense counterpart of `retinanet_resnet34_s8u1_scenes.py`."""
_base_ = './retinanet_resnet34_s8u1_scenes.py'

model = dict(backbone=dict(
    _delete_=True, type='timm_lean.TimmBackbone', model_name='resnet34', out_indices=(2, 3, 4),
    model_args=dict(channels=(16, 32, 64, 128), zero_init_last=False)))
custom_hooks = [dict(type='timm_lean.SafetensorsHook')]
