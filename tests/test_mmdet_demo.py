"""The detection demo from end to end."""
import json
from pathlib import Path

import mmdet_support  # noqa: F401  (skips without MMDetection)
import pytest

from timm_lean.mmdet.demo import detection_demo
from timm_lean_cli.demo_steps import compress_detector


@pytest.mark.slow
def test_demo(tmp_path, capsys):
    directory = detection_demo(tmp_path)
    output = capsys.readouterr().out
    assert 'epoch 10/10' in output and 'COCO AP' in output and 'Average Precision' not in output
    assert next(tmp_path.glob('*/detection.png')).stat().st_size > 10_000
    result = compress_detector(directory)
    small = Path(result['output'])
    assert small.stat().st_size <= 0.3 * (directory / 'model.safetensors').stat().st_size
    assert json.loads(json.dumps(result))['report']['chosen']['sizes']['file'] == small.stat().st_size
    output = capsys.readouterr().out
    assert '<- chosen' in output and 'when reloaded' in output
    assert (small.parent / 'frontier.png').read_bytes()[:4] == b'\x89PNG'
