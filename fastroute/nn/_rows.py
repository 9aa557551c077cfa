"""Rows of a tensor, taken and put back."""

import torch
from torch import Tensor

from fastroute.ops._paths import channels_last


class TakeRows(torch.autograd.Function):
    """Return x[index], of which no row is taken twice.

    The gradient is a selection too, and needs no sums: it is deterministic, and faster than that of `index_select`.

    Args:
        x: (R, …). A row that needs no gradient may be taken more than once.
        index: (M,), the rows of x.
        places: (R,), the place of each row of x in the output; M or more for a row that is not taken.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, index: Tensor, places: Tensor) -> Tensor:
        return _index_select(x, index)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, index, places = inputs
        ctx.save_for_backward(index, places)
        ctx.save_for_forward(index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        index, places = ctx.saved_tensors
        if len(index) < len(places):  # rows that are not taken get one of zeros
            grad = torch.cat([grad, torch.zeros_like(grad[:1])])
            index, places = torch.cat([index, index.new_zeros(1)]), places.clamp(max=len(index))
        return TakeRows.apply(grad, places, index), None, None

    @staticmethod
    def jvp(ctx, tangent: Tensor, *_) -> Tensor:
        [index] = ctx.saved_tensors
        return _index_select(tangent, index)


def _index_select(x: Tensor, index: Tensor) -> Tensor:
    """Return x[index] in x's memory format; `Tensor.index_select` always returns NCHW."""
    if x.is_contiguous() or not channels_last(x):
        return x.index_select(0, index)
    return x.movedim(1, -1).index_select(0, index).movedim(-1, 1)
