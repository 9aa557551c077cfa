"""The gates of a router on their own (Eq. 3.3 to 3.5)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastroute.ops._paths import accumulate_dtype, check_paths, path_list
from fastroute.ops.cross_connect import _check_parameters


class Gates(NamedTuple):
    """What `gate` returns; see there for the shapes."""

    gates: Tensor
    scores: Tensor


def gate(xs: Sequence[Tensor], w1: Tensor | None, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> Gates:
    """The gates that m parallel tensors compute for n outputs, as `cross_connect` has them, without its mixing.

    Args:
        xs, w1, b1, w2, b2: as for `cross_connect`.

    Returns:
        gates: (N, m, n), `gates[s, i, j]` is the weight of input i in output j; each row i sums to 1.
        scores: (N, m, n), the scores before softmax. Both are float32 for half-precision paths, and differentiable.

    Raises:
        TypeError, ValueError: as for `cross_connect`.
    """
    xs = path_list("xs", xs)
    check_paths("xs", xs)
    _check_parameters(xs, w1, b1, w2, b2)
    dtype = accumulate_dtype(xs[0].dtype)
    w1, b1, w2, b2 = (None if p is None else p.to(dtype) for p in (w1, b1, w2, b2))
    scores = []
    for i, x in enumerate(xs):
        z = x.flatten(2).mean(2, dtype=dtype) if x.dim() > 2 else x.to(dtype)  # Eq. 3.3
        if w1 is not None:
            z = torch.relu(z @ w1[i].T + (0 if b1 is None else b1[i]))
        scores.append(z @ w2[i].T + (0 if b2 is None else b2[i]))  # Eq. 3.4
    scores = torch.stack(scores, 1)
    return Gates(torch.softmax(scores, -1), scores)  # Eq. 3.5
