"""Dense backbone on BCCD; the counterpart of `retinanet_resnet34_s8u1_bccd.py`."""
_base_ = '../_base_/retinanet_bccd.py'
