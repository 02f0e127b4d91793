"""Faster R-CNN with MobileNetV2 as backbone."""
_base_ = '../_base_/faster_rcnn_1x_coco.py'

model = dict(backbone=dict(model_name='mobilenetv2_100'))
