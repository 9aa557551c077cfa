"""Count the multiply-accumulates of a network."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from fastroute.models._modes import modes_kept
from fastroute.models._shapes import like
from fastroute.ops._library import OPERATORS


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Return the multiply-accumulates for one image: half of what `torch.utils.flop_counter` counts, with routing.

    `FlopCounterMode` by itself leaves out the operators of this package.

    Args:
        model: a network; on the meta device it is counted without computing anything.
        input_size: (channels, height, width) of the image, in pixels.

    Returns:
        the number of multiply-accumulates.

    Raises:
        TypeError: input_size is no tuple.

    Example:
        >>> from fastroute.models import create_model
        >>> with torch.device("meta"):
        ...     resnet = create_model("resnet20")
        >>> count_macs(resnet, (3, 32, 32)) // 10**6
        40
    """
    from torch.utils.flop_counter import FlopCounterMode

    if not isinstance(input_size, Iterable):
        raise TypeError(f"input_size is {input_size!r}; it must be a tuple such as (3, 224, 224)")
    with FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter, torch.no_grad(), modes_kept(model):
        model.eval()(like(model).new_empty(1, *input_size))
    return counter.get_total_flops() // 2


def _mix(xs, gates, *_, **__) -> int:
    return 2 * len(xs) * gates[-1] * math.prod(xs[0])


def _gate(xs, w1, b1, w2, b2, **__) -> int:
    """Count the pooling, one addition for each element, and the two layers."""
    pool = len(xs) * math.prod(xs[0])
    return pool + 2 * xs[0][0] * (math.prod(w2) + (math.prod(w1) if w1 else 0))


def _cross_connect(xs, w1, b1, w2, b2, *_, **__) -> int:
    return _gate(xs, w1, b1, w2, b2) + _mix(xs, w2[:2])


def _cross_predict(xs, weight, *_, out_shape, **__) -> int:
    """Count the predictions and their sums."""
    return 2 * len(xs) * (math.prod(weight[3:]) + 1) * sum(map(math.prod, out_shape))


_FORMULAS = {"cross_connect": _cross_connect, "cross_predict": _cross_predict, "gate": _gate, "mix": _mix}
_FLOPS = {getattr(torch.ops.fastroute, name): _FORMULAS[name] for name in OPERATORS.keys() & _FORMULAS.keys()}
