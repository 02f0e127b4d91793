"""`timm-lean demo` without its detector, from end to end."""
import json

import pytest
import timm
import torch

from timm_lean import load_model
from timm_lean_cli.demo_steps import demo


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the search ends within two minutes, unless the machine is busy: it measures latency
def test_demo(tmp_path, capsys):
    result = demo(tmp_path)
    out = capsys.readouterr().out
    assert 'identical outputs' in out and '<- chosen' in out
    (folder,) = tmp_path.iterdir()
    assert json.loads(json.dumps(result)) == result and result['output'] == str(folder) and len(result['models']) == 2
    small, dense = (folder / name for name in ('small.safetensors', 'dense/last.safetensors'))
    assert small.stat().st_size <= 0.25 * dense.stat().st_size
    assert (folder / 'frontier.png').read_bytes()[:4] == b'\x89PNG'
    again = timm.create_model(f'local-dir:{folder / "hf"}', pretrained=True).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(x), load_model(small)(x))
