"""Focal losses of `mmcv._ext`, elementwise, with gradients.

- Sigmoid, `p = sigmoid(x)`: `-alpha (1 - p)^gamma log p` for the target's class, `-(1 - alpha) p^gamma log(1 - p)` for
  the others.
- Softmax, p the probability of the target's class: `-alpha (1 - p)^gamma log p`.

The logarithms of a sigmoid are `logsigmoid(x)` and `logsigmoid(-x)`. mmcv clamps the rounded probability instead, which
in float32 gives -87 for `log(1 - p)` as soon as x > 17; here it is `-x`, which is right.
The weight of a loss is that of the target's class. For background (a target outside the classes) mmcv reads outside the
array of weights; here it is 1.

Source: Focal Loss, Lin et al. 2017, arXiv 1708.02002.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import exact, widen

__all__ = [
    'sigmoid_focal_loss_backward',
    'sigmoid_focal_loss_forward',
    'softmax_focal_loss_backward',
    'softmax_focal_loss_forward',
]


def _class_weight(weight: Tensor, target: Tensor, num_classes: int) -> Tensor | float:
    """Weight `[N]` of each target's class; 1 for background, and without class weights (an empty tensor)."""
    if not weight.numel():
        return 1.0
    in_range = (target >= 0) & (target < num_classes)
    return torch.where(in_range, weight[target.clamp(0, num_classes - 1)], 1.0)


def _sign_and_share(logits: Tensor, target: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Sign and factor `[N, C]`: the loss of a negative is that of a positive, logit negated and alpha complemented."""
    positive = (target[:, None] == torch.arange(logits.shape[1], device=logits.device)).to(logits.dtype)
    return 2 * positive - 1, alpha * positive + (1 - alpha) * (1 - positive)


@exact
def sigmoid_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Sigmoid focal loss of every logit.

    Args:
        input: Logits `[N, C]`.
        target: Classes `[N]`, int64; a value outside `0..C-1` is background.
        weight: Class weights `[C]`, or empty.
        output: Filled, `[N, C]`.
        gamma: Focusing exponent.
        alpha: Share of the positive class.
    """
    logits, weight = widen(input, weight)
    sign, share = _sign_and_share(logits, target, alpha)
    loss = -share * torch.sigmoid(-sign * logits) ** gamma * F.logsigmoid(sign * logits)
    output.copy_((loss.T * _class_weight(weight, target, logits.shape[1])).T)


@exact
def sigmoid_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Fill `grad_input` `[N, C]` with the derivative of every loss by its logit.

    Arguments as in `sigmoid_focal_loss_forward`.
    """
    logits, weight = widen(input, weight)
    sign, share = _sign_and_share(logits, target, alpha)
    p, miss = torch.sigmoid(sign * logits), torch.sigmoid(-sign * logits)
    slope = sign * share * miss**gamma * (gamma * p * F.logsigmoid(sign * logits) - miss)
    grad_input.copy_((slope.T * _class_weight(weight, target, logits.shape[1])).T)


@exact
def softmax_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Softmax focal loss of every sample.

    Args:
        input: Softmax probabilities `[N, C]` (mmcv's Python has applied the softmax).
        target: Classes `[N]`, int64; a value outside `0..C-1` is ignored.
        weight: Class weights `[C]`, or empty.
        output: Filled, `[N]`.
        gamma: Focusing exponent.
        alpha: Factor of the loss.
    """
    softmax, weight = widen(input, weight)
    p, counted = _target_probability(softmax, target)
    loss = -alpha * (1 - p) ** gamma * p.clamp(min=torch.finfo(p.dtype).tiny).log()
    output.copy_(loss * counted * _class_weight(weight, target, softmax.shape[1]))


@exact
def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Fill `grad_input` `[N, C]` with the derivative of each sample's loss by its logits.

    Arguments as in `softmax_focal_loss_forward`; `buff` `[N]` is filled with `d loss / d log p`.
    """
    softmax, weight = widen(input, weight)
    p, counted = _target_probability(softmax, target)
    tiny = torch.finfo(p.dtype).tiny
    # (1 - p)^(gamma - 1) grows without bound for gamma < 1, where log p goes to 0 faster.
    miss = (1 - p).clamp(min=tiny)
    by_log_p = alpha * (gamma * miss ** (gamma - 1) * p * p.clamp(min=tiny).log() - miss**gamma)
    by_log_p = by_log_p * counted * _class_weight(weight, target, softmax.shape[1])
    buff.copy_(by_log_p)
    one_hot = torch.zeros_like(softmax).scatter_(1, target.clamp(0, softmax.shape[1] - 1)[:, None], 1.0)
    grad_input.copy_(by_log_p[:, None] * (one_hot - softmax))


def _target_probability(softmax: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Probability `[N]` of each target's class, and whether the target is a class at all `[N]`."""
    num_classes = softmax.shape[1]
    p = softmax.gather(1, target.clamp(0, num_classes - 1)[:, None])[:, 0]
    return p, (target >= 0) & (target < num_classes)
