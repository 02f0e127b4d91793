"""As `retinanet_resnet34_s8u1_scenes.py`, and 30 % of the backbone's kernels pruned on the way, as the demo does it."""
_base_ = './retinanet_resnet34_s8u1_scenes.py'

custom_hooks = [
    dict(type='timm_lean.RegularizerHook', regularizers=[dict(type='basis_ortho', weight=10)]),
    dict(type='timm_lean.KernelPruningHook', criterion='spectral_norm', amount=0.3, schedule='cubic', begin=3, end=9),
    dict(type='timm_lean.SafetensorsHook'),
]
