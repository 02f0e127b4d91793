"""Small RetinaNet with a shared-basis backbone on the embedded scenes of digits, as the demo trains it."""
_base_ = '../../timm_lean/mmdet/scenes_config.py'
