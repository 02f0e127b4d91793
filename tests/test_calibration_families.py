"""Slow: calibrated networks of many timm families are never further from the original than uncalibrated ones."""
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

sys.path.insert(0, str(Path(__file__).parents[1] / 'tools'))
from reproduce_calibration_families import FAMILIES, TECHNIQUES, measure  # noqa: E402

REFUSED = {}  # what a technique does not do, by network and technique: why


@pytest.mark.parametrize('technique', TECHNIQUES)
@pytest.mark.parametrize('name', FAMILIES)
def test_never_worse(name, technique):
    """What is refused is refused for a known reason, and nothing else is."""
    result = measure(name, technique)
    reason = REFUSED.get((name, technique))
    assert ('refused' in result) == (reason is not None), result
    if reason is not None:
        assert reason in result['refused']
    else:
        assert result['after'] <= result['before'] * (1 + 1e-4) + 1e-6
