"""The stand-in's operators on a device, in full and half precision, against the CPU in float32 on the same inputs."""
import pytest
import torch
from mmcv_calls import map_tensors, record_calls, tensors_of
from torch.testing import assert_close

from timm_lean import mmcv_ext

NAMES = [name for part in mmcv_ext.SUPPORTED.values() for name in part]


@pytest.fixture(scope='module')
def calls():
    with pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        return record_calls(patch)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('name', NAMES)
def test_operators_have_the_values_of_the_cpu(name, dtype, calls, device):
    rounded = map_tensors(calls[name], lambda t: t.to(dtype) if t.is_floating_point() else t.clone())
    here = map_tensors(rounded, lambda t: t.to(device, copy=True))
    cpu = map_tensors(rounded, lambda t: t.float() if t.is_floating_point() else t.clone())
    found, wanted = (tensors_of(call, call[0](*call[1], **call[2])) for call in (here, cpu))
    assert len(found) == len(wanted)
    assert all(t.device.type == device.type for t in tensors_of(here))
    eps = max(torch.finfo(dtype).eps, 1e-6)
    for a, b in zip(found, wanted, strict=True):
        if b.is_floating_point():
            largest = b.abs().max().item() if b.numel() else 0.
            assert_close(a.cpu().float(), b, rtol=4 * eps, atol=4 * eps * largest)
        else:
            assert_close(a.cpu(), b)
