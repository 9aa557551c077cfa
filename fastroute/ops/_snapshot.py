"""Copies of buffers that compiled graphs save for their backward."""

import torch
from torch import Tensor

from fastroute.ops._library import PYTHON

PYTHON.define("snapshot(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
PYTHON.impl("snapshot", torch.clone, "CompositeExplicitAutograd")


def snapshot(x: Tensor) -> Tensor:
    """Return x, a buffer that the same forward updates in place; in a compiled graph, a copy of it.

    To save memory, a compiled backward computes cheap operations again. Where these read a buffer that the forward has
    updated since, PyTorch silently takes the new values. It saves the results of operators that it does not know,
    such as this copy, unless it is told to compute more again: with `torch._functorch.config.activation_memory_budget`
    below 1, or `aggressive_recomputation`, gradients through such buffers are wrong.
    """
    return torch.ops.fastroute_python.snapshot.default(x) if torch.compiler.is_compiling() else x
