"""A small RetinaNet for folders in COCO format, set up for BCCD (blood cells, three classes, 640 x 480 pixels).

For another folder set `data_root`, `classes` and `num_classes`; the files are `annotations/{train,test}.json` and
`images/`. Images are halved; the backbone starts from scratch and has a quarter of the usual width, so that
CPUs can train it.
"""
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    'mmdet::_base_/default_runtime.py',
]

custom_imports = dict(imports=['timm_lean.mmdet'], allow_failed_imports=False)
data_root = 'data/bccd/'
classes = ('RBC', 'WBC', 'Platelets')
image_scale = (320, 240)

model = dict(
    backbone=dict(
        _delete_=True, type='timm_lean.TimmBackbone', model_name='resnet34', out_indices=(2, 3, 4),
        model_args=dict(channels=(16, 32, 64, 128), zero_init_last=False)),
    neck=dict(in_channels='auto', out_channels=64, start_level=0, num_outs=4),
    bbox_head=dict(
        num_classes=3, in_channels=64, stacked_convs=2, feat_channels=64,
        anchor_generator=dict(strides=[8, 16, 32, 64], octave_base_scale=3)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25], direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        type='CocoDataset', data_root=data_root, metainfo=dict(classes=classes), ann_file='annotations/train.json',
        data_prefix=dict(img='images/'), filter_cfg=dict(filter_empty_gt=True), pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset', data_root=data_root, metainfo=dict(classes=classes), ann_file='annotations/test.json',
        data_prefix=dict(img='images/'), test_mode=True, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', ann_file=data_root + 'annotations/test.json', metric='bbox')
test_evaluator = val_evaluator

max_epochs = 12
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=1e-2),
    clip_grad=dict(max_norm=10., norm_type=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=max_epochs, T_max=max_epochs, eta_min=1e-5,
         convert_to_iter_based=True),
]
default_hooks = dict(checkpoint=dict(max_keep_ckpts=1), logger=dict(interval=20))
custom_hooks = [dict(type='timm_lean.SafetensorsHook')]
randomness = dict(seed=0)
