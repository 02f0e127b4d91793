"""The detection demo from end to end."""
import mmdet_support  # noqa: F401  (skips without MMDetection)
import pytest

from timm_lean.mmdet.demo import detection_demo


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    detection_demo(tmp_path)
    output = capsys.readouterr().out
    assert 'epoch 14/14' in output and 'COCO AP' in output and 'Average Precision' not in output
    assert next(tmp_path.glob('*/detection.png')).stat().st_size > 10_000
