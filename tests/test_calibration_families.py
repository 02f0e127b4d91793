"""Slow: calibrated networks of many timm families are never further from the original than uncalibrated ones."""
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

sys.path.insert(0, str(Path(__file__).parents[1] / 'tools'))
from reproduce_calibration_families import FAMILIES, TECHNIQUES, measure  # noqa: E402

REASONS = {  # for which a technique may refuse a network
    'kernels': r'(?!)',
    'channels': r'has no channels to prune|cannot run with fewer channels',
    'share': r'nothing to share',
    'blocks': r'no residual block whose input and output have one shape'}


@pytest.mark.parametrize('technique', TECHNIQUES)
@pytest.mark.parametrize('name', FAMILIES)
def test_never_worse(name, technique):
    """What is refused is refused for a known reason."""
    result = measure(name, technique)
    if 'refused' in result:
        assert re.search(REASONS[technique], result['refused'])
    else:
        assert result['after'] <= result['before'] * (1 + 1e-4) + 1e-6
