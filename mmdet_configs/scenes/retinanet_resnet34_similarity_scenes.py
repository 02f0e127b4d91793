"""As `retinanet_resnet34_scenes.py`, with Convolutional Similarity on the filters of the backbone, fading out."""
_base_ = './retinanet_resnet34_scenes.py'

custom_hooks = [
    dict(type='timm_lean.RegularizerHook', regularizers=[
        dict(type='conv_similarity', weight=1e-4, normalize=False, schedule='cosine')]),
    dict(type='timm_lean.SafetensorsHook'),
]
