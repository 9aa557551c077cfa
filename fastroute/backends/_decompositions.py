"""Decompositions into plain PyTorch: for transforms, ONNX export, and `run_decompositions` of an exported program."""

from collections.abc import Callable

import torch

from fastroute.backends.reference import kernels
from fastroute.ops._library import OPERATORS, PLAIN


def _decompose(name: str, prepare: Callable) -> Callable:
    return lambda *args: getattr(kernels, name)(*prepare(*args))


for _name, _prepare in OPERATORS.items():
    _operator = getattr(torch.ops.fastroute, _name).default
    PLAIN[_name] = _decompose(_name, _prepare)
    torch._decomp.register_decomposition(_operator, unsafe=True)(PLAIN[_name])
    # Without this entry, fake tensors of symbolic sizes would use the decomposition instead of the fake kernel.
    torch._decomp.meta_table[_operator] = _operator
