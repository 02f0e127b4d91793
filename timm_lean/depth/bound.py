"""From the entropy of a dataset to a bound on the depth of a network.

Paper: https://arxiv.org/abs/2106.14190 claims that beyond a depth set by the entropy of the data further layers add
cost and no accuracy. The map from entropy to depth that it used could not be obtained, so nothing here is that formula.
A rule is a named function that anybody can replace; those below are this project's own reading, with their reasons.
"""
import math
from collections.abc import Callable

from timm_lean.errors import LeanError

from .entropy import EntropyResult

__all__ = ['DEFAULT_RULE', 'Rule', 'depth_bound', 'get_rule', 'list_rules', 'register_rule', 'resolutions']

Rule = Callable[[float, int, int, int], int]
DEFAULT_RULE = 'bits_per_stage'
_RULES: dict[str, Rule] = {}
_ROUNDING = 1e-9  # uniform noise has 8 bits, not 8.000000000000002


def register_rule(function: Rule) -> Rule:
    """Decorator: make a function `(entropy in bits, image_size, channels, num_classes) -> int` a rule by its name."""
    name = getattr(function, '__name__', '')
    if not name or name in _RULES:
        raise LeanError(f'A depth rule needs a name that is not taken, got {name!r}. Taken: {", ".join(list_rules())}.')
    _RULES[name] = function
    return function


def list_rules() -> list[str]:
    """Names of the rules, sorted."""
    return sorted(_RULES)


def get_rule(rule: str | Rule) -> Rule:
    """A rule by name; a function is returned as it is."""
    if callable(rule):
        return rule
    if rule not in _RULES:
        raise LeanError(f'Unknown depth rule {rule!r}. Known: {", ".join(list_rules())}.')
    return _RULES[rule]


def resolutions(image_size: int) -> int:
    """Number of resolutions a network passes through, halving the image's side down to 8 or more pixels."""
    return max(1, math.floor(math.log2(image_size / 8)) + 1)


@register_rule
def bits_per_stage(entropy: float, image_size: int, channels: int, num_classes: int) -> int:
    """This project's reading: at one resolution, as many convolutions as a pixel value has bits.

    A value of the input carries H bits on average. Suppose a convolution layer that does more than pass its input on
    settles at least one bit of each value (one yes/no question about it). Then ceil(H) layers have asked all there is
    to ask at one resolution, and only a change of resolution, which puts other values next to each other, gives
    further layers something to do: D = ceil(H bits) x number of resolutions, the side halved down to 8 pixels.
    CIFAR-10: 8 x 3 = 24; 224 pixels at 7.3 bits: 8 x 5 = 40; the 8 x 8 handwritten digits: 3.

    Limits: one bit per layer is an assumption, not a theorem. First-order entropy does not see how pixels depend on
    each other (shuffling the pixels of every image changes nothing here and everything for a network), nor how hard
    the classes are to tell apart; `channels` and `num_classes` do not enter. Natural 8-bit photographs nearly all have
    7 to 8 bits, so among them the bound depends on the image size alone.
    """
    return max(1, math.ceil(entropy - _ROUNDING)) * resolutions(image_size)


@register_rule
def bits_per_octave(entropy: float, image_size: int, channels: int, num_classes: int) -> int:
    """The same reasoning with every halving of the side counted, down to one pixel: a looser bound.

    D = ceil(H bits) x max(1, floor(log2 image_size)). CIFAR-10: 8 x 5 = 40. For networks that go on convolving maps of
    4 x 4 pixels and less. The limits are those of `bits_per_stage`.
    """
    return max(1, math.ceil(entropy - _ROUNDING)) * max(1, math.floor(math.log2(image_size)))


def depth_bound(
        entropy: float | EntropyResult,
        image_size: int | tuple[int, int],
        channels: int = 3,
        num_classes: int = 10,
        rule: str | Rule = DEFAULT_RULE,
) -> int:
    """How many convolution layers, one after another, a network for this data should have at most.

    Args:
        entropy: In bits, or what `dataset_entropy` returned.
        image_size: Side of the images the network will see, in pixels; of two sides the shorter counts.
        channels: Channels of the images.
        num_classes: Number of classes.
        rule: Name of a rule (`list_rules()`), or a function `(entropy, image_size, channels, num_classes) -> int`.

    Raises:
        LeanError: A bad argument, an unknown rule, or a rule whose answer is not a number of layers.
    """
    bits = entropy.bits if isinstance(entropy, EntropyResult) else entropy
    if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not math.isfinite(bits) or bits < 0:
        raise LeanError(f'entropy must be a finite number of bits of at least 0, got {bits!r}.')
    side = min(image_size) if isinstance(image_size, (tuple, list)) else image_size
    for name, value in (('image_size', side), ('channels', channels), ('num_classes', num_classes)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise LeanError(f'{name} must be a whole number of at least 1, got {value!r}.')
    function = get_rule(rule)
    bound = function(float(bits), side, channels, num_classes)
    if not isinstance(bound, int) or isinstance(bound, bool) or bound < 1:
        raise LeanError(f'The depth rule {getattr(function, "__name__", function)!r} must return a whole number of at '
                        f'least 1, got {bound!r}.')
    return bound
