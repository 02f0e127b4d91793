"""One call of every operator of the stand-in for compiled mmcv, as mmcv's own functions make it."""
from collections.abc import Callable
from typing import Any

import pytest
import torch

from timm_lean import mmcv_ext

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def map_tensors(call: Call, change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    """The call with its tensors changed."""
    def one(value: Any) -> Any:
        return change(value) if torch.is_tensor(value) else value

    function, args, kwargs = call
    return function, tuple(map(one, args)), {key: one(value) for key, value in kwargs.items()}


def tensors_of(call: Call, result: Any = None) -> list[torch.Tensor]:
    """All tensors that a call takes, those that it fills among them, and those that it returned."""
    _, args, kwargs = call
    returned = result if isinstance(result, (list, tuple)) else [result]
    values = [*args, *kwargs.values(), *(torch.tensor(r) if isinstance(r, list) else r for r in returned)]
    return [value for value in values if torch.is_tensor(value)]


def record_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Call]:
    """The first call of each operator in a forward and backward pass of everything, on the CPU, by name.

    Values are eighths, and different within a channel, so that half precision keeps them and no maximum is a tie.
    """
    pytest.importorskip('mmcv')
    assert mmcv_ext.install()
    from mmcv import _ext, ops
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
    calls: dict[str, Call] = {}

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = (function, args, kwargs)
            if name not in calls:
                calls[name] = map_tensors(call, lambda t: t.detach().clone())
            return function(*args, **kwargs)
        return run

    for name in (name for part in mmcv_ext.SUPPORTED.values() for name in part):
        monkeypatch.setattr(_ext, name, recorded(name, getattr(_ext, name)))

    def rand(*shape: int) -> torch.Tensor:
        return ((torch.rand(shape) * 8).round() / 8).requires_grad_()

    x = torch.stack([torch.randperm(64).view(8, 8) / 8. for _ in range(8)]).view(2, 4, 8, 8).requires_grad_()
    rois = torch.tensor([[0, 0.25, 0, 6, 6], [1, 1, 1.5, 7, 7], [1, 1, 1, 6.5, 7]])
    boxes, scores, target = rois[:, 1:], torch.tensor([0.5, 0.75, 0.25]), torch.tensor([0, 1, 2])
    masks = rand(2, 9, 16, 16)
    outputs = [
        ops.roi_align(x, rois, (2, 2), 1., 2, 'avg', True), ops.roi_pool(x, rois, (2, 2)),
        ops.deform_conv2d(x, rand(2, 18, 8, 8), rand(4, 4, 3, 3), 1, 1),
        ops.modulated_deform_conv2d(x, rand(2, 18, 8, 8), rand(2, 9, 8, 8), rand(4, 4, 3, 3), rand(4), 1, 1),
        ops.sigmoid_focal_loss(rand(3, 4), target, 2., 0.25, None, 'mean'),
        ops.softmax_focal_loss(rand(3, 4), target, 2., 0.25, None, 'mean'),
        ops.carafe(x, masks, 3, 1, 2),
        MultiScaleDeformableAttnFunction.apply(
            rand(1, 2, 2, 4), torch.ones(2, 2, dtype=torch.long), torch.arange(2), rand(1, 3, 2, 2, 4, 2),
            rand(1, 3, 2, 2, 4), 64)]
    sum(output.sum() for output in outputs).backward()
    with torch.no_grad():
        upsampled = ops.carafe_naive(x, masks, 3, 1, 2)
        # in mmcv this backward pass insists on a GPU
        _ext.carafe_naive_backward(torch.ones_like(upsampled), x, masks, torch.zeros_like(x), torch.zeros_like(masks),
                                   kernel_size=3, group_size=1, scale_factor=2)
        ops.masked_conv.masked_conv2d(x[:1], torch.ones(1, 8, 8), rand(4, 4, 3, 3), rand(4), 1)
        ops.bbox_overlaps(boxes, boxes)
        ops.nms(boxes, scores, 0.5)
        ops.soft_nms(boxes, scores, 0.5)
        ops.nms_match(torch.cat((boxes, scores[:, None]), 1), 0.5)
    return calls
