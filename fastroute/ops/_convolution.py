"""For which geometries PyTorch's convolutions are right."""

from collections.abc import Sequence

import torch
from torch import Tensor


def kernel_fits(x: Sequence[int], weight: Sequence[int], stride, padding, dilation) -> bool:
    """Whether every position of the kernel meets the map itself, and not padding alone, and the map is no smaller.

    Where this is not so, PyTorch's convolutions in bfloat16 on a CPU give a wrong gradient of the weight, or crash; in
    float32 they are right.

    Args:
        x, weight: the shapes (N, C, *S) and (C', C, *k).
    """
    for size, k, s, p, d in zip(x[2:], weight[2:], stride, padding, dilation, strict=True):
        reach = d * (k - 1)
        if reach >= size:
            return False
        last = (size + 2 * p - reach - 1) // s
        for first in (position * d - p for position in range(k)):  # what the first output's position meets
            output = max(0, -(first // s))  # the first output that meets the map there
            if output > last or output * s + first >= size:
                return False
    return True


def is_exact(x: Tensor, weight: Tensor, stride, padding, dilation) -> bool:
    """Whether PyTorch's convolutions are right in x's type and on its device."""
    known = x.device.type != "cpu" or x.dtype in (torch.float32, torch.float64)
    return known or kernel_fits(x.shape, weight.shape, stride, padding, dilation)
