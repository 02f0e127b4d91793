"""Mask R-CNN with ResNet-50 as backbone."""
_base_ = '../_base_/mask_rcnn_1x_coco.py'

model = dict(backbone=dict(model_name='resnet50'))
