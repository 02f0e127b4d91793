"""FCOS with ResNet-50 as backbone."""
_base_ = '../_base_/fcos_1x_coco.py'

model = dict(backbone=dict(model_name='resnet50'))
