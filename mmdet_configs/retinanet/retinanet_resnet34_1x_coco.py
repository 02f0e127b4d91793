"""RetinaNet with ResNet-34 as backbone."""
_base_ = '../_base_/retinanet_1x_coco.py'

model = dict(backbone=dict(model_name='resnet34'))
