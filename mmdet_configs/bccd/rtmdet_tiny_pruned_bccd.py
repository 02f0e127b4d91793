"""A trained `rtmdet_tiny_bccd.py` with 30 % of its channels removed when training begins, then trained a little on."""
_base_ = './rtmdet_tiny_bccd.py'

load_from = 'work_dirs/rtmdet_tiny_bccd/best.safetensors'
optim_wrapper = dict(optimizer=dict(lr=2e-4))
max_epochs = 4
train_cfg = dict(max_epochs=max_epochs)
param_scheduler = [
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=max_epochs, T_max=max_epochs, eta_min=1e-6,
         convert_to_iter_based=True),
]
custom_hooks = [
    dict(type='timm_lean.ChannelPruningHook', pruning_ratio=0.3, calibrate=64),
    dict(type='timm_lean.SafetensorsHook'),
]
