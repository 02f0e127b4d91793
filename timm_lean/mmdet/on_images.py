"""A detector as a function of images alone, as the techniques of this package take a network.

Techniques run a network as `model(images)`: to trace which channels depend on each other, to calibrate, to rank blocks.
A detector's forward pass wants samples and a mode, and selects boxes on the way, which no gradient passes and which
differ between a detector and its compressed copy. Here it gives the tensors of its heads before any box is selected;
the second stage of a two-stage detector looks at the same boxes in every image.

Three such functions, from the most to the least of a detector: all of it, its features, its backbone.
"""
import copy
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn as nn
from mmdet.models.detectors import DetectionTransformer, TwoStageDetector
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch.utils._pytree import tree_leaves

__all__ = ['PARTS', 'forget', 'image_samples', 'on_images', 'prediction_layers', 'runnable_part', 'traceable_parts']

PARTS = ('whole', 'features', 'backbone')
_CUTS = (1, 2, 4)  # into how many boxes a side is divided
_logger = logging.getLogger(__name__)


@contextmanager
def on_images(detector: nn.Module, part: str = 'whole', predictions: Sequence[str] = ()) -> Iterator[nn.Module]:
    """Within, `detector(images)` maps `[B, 3, H, W]` to a list of tensors; copies made within do so for good.

    Args:
        detector: A detector; its names and parameters stay what they are.
        part: One of `PARTS`: what is run.
        predictions: Names of layers that are to it what a classifier is to a timm model: `get_classifier()` gives them.
    """
    # a copy of the detector gets methods of its own
    detector.forward = MethodType(_FORWARDS[part], detector)
    if predictions:
        detector.get_classifier = MethodType(  # type: ignore[assignment]
            lambda self: [self.get_submodule(name) for name in predictions], detector)
    try:
        yield detector
    finally:
        forget(detector)


def forget(detector: nn.Module) -> None:
    """Give a detector its own forward pass back."""
    for name in ('forward', 'get_classifier'):
        detector.__dict__.pop(name, None)


def prediction_layers(detector: nn.Module, images: torch.Tensor) -> list[str]:
    """Names of the layers that give the outputs of a detector that runs as a whole on `[B, 3, H, W]`."""
    twin = copy.deepcopy(detector).eval()
    with torch.enable_grad(), _leaves(twin) as made:
        outputs = _tensors(_whole(twin, images.clone().requires_grad_()))
    names = {tensor.grad_fn: name for name, tensor in made}
    return sorted({names[node] for node in _reached(outputs, names) if node in names})


@torch.no_grad()
def runnable_part(detector: nn.Module, x: torch.Tensor) -> str:
    """The most of a detector that runs on images alone."""
    twin = copy.deepcopy(detector).eval()
    for part in traceable_parts(detector):
        try:
            with on_images(twin, part):
                twin(x)
            return part
        except Exception as e:  # a head that wants more than features
            _logger.debug(f'{part} of {type(detector).__name__} does not run on images alone: {e}')
    return 'backbone'


def traceable_parts(detector: Any) -> Sequence[str]:
    """Of `PARTS` those to try, the most first, in tracing which channels depend on each other."""
    # attention reshapes channels in ways that are not traced; the encoder reads the features
    whole = () if isinstance(detector, DetectionTransformer) else ('whole',)
    return (*whole, 'features', 'backbone') if getattr(detector, 'with_neck', False) else (*whole, 'backbone')


def image_samples(images: torch.Tensor) -> list[DetDataSample]:
    """What a detector is told of a batch of images that were neither resized nor padded."""
    size = tuple(images.shape[2:])
    return [DetDataSample(metainfo=dict(
        img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size, scale_factor=(1., 1.),
        border=(0, 0, 0, 0)))  # CenterNet asks what was padded on each side
        for _ in images]


def _whole(detector: Any, images: torch.Tensor) -> Any:
    samples = image_samples(images)
    if not isinstance(detector, TwoStageDetector):
        return detector._forward(images, samples)
    features = detector.extract_feat(images)
    outputs = [detector.rpn_head(features)] if detector.with_rpn else []
    boxes = _boxes(images)
    proposals = [InstanceData(bboxes=boxes, scores=boxes.new_ones(len(boxes)),
                              labels=boxes.new_zeros(len(boxes), dtype=torch.long)) for _ in samples]
    return [*outputs, detector.roi_head.forward(features, proposals, samples)]


def _features(detector: Any, images: torch.Tensor) -> Any:
    return detector.extract_feat(images)


def _backbone(detector: Any, images: torch.Tensor) -> Any:
    return detector.backbone(images)


def _on_images(function: Callable[[Any, torch.Tensor], Any]) -> Callable[[nn.Module, torch.Tensor], list[torch.Tensor]]:
    """The forward pass that a detector gets: all tensors in what a function of it and of images gives."""
    def forward(detector: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
        if not torch.is_grad_enabled():
            return _tensors(function(detector, images))
        with _leaves(detector) as made:
            outputs = _tensors(function(detector, images))
        outputs += _unread(outputs, made)
        # while a graph is traced each has an end of its own in it, even one that another layer reads too
        return [tensor * 1 for tensor in outputs]

    return forward


_FORWARDS = {part: _on_images(function)
             for part, function in zip(PARTS, (_whole, _features, _backbone), strict=True)}


@contextmanager
def _leaves(detector: nn.Module) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Within, what the layers of a detector make is noted, with their names."""
    made: list[tuple[str, torch.Tensor]] = []
    handles = [layer.register_forward_hook(lambda layer, args, output, name=name: made.append((name, output)))
               for name, layer in detector.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def _unread(outputs: list[torch.Tensor], made: list[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
    """What layers made that reaches no output: a backbone may run on behind its last feature level."""
    reached = _reached(outputs)
    return [tensor for _, tensor in made if tensor.grad_fn is not None and tensor.grad_fn not in reached]


def _reached(outputs: list[torch.Tensor], ends: Collection[Any] = ()) -> set[Any]:
    """The operations that outputs depend on; behind those of `ends` one does not look."""
    reached, todo = set(), [tensor.grad_fn for tensor in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in reached:
            reached.add(node)
            if node not in ends:
                todo += [parent for parent, _ in node.next_functions]
    return reached


def _boxes(images: torch.Tensor) -> torch.Tensor:
    """Boxes `[N, 4]` that tile the image in several sizes."""
    height, width = images.shape[2:]
    boxes = [(width * x / cuts, height * y / cuts, width * (x + 1) / cuts, height * (y + 1) / cuts)
             for cuts in _CUTS for y in range(cuts) for x in range(cuts)]
    return torch.tensor(boxes, device=images.device, dtype=images.dtype)


def _tensors(outputs: Any) -> list[torch.Tensor]:
    """The float tensors in what a detector gives back, one after the other."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
