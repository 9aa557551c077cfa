"""What PyTorch's convolutions are given, so that they are right."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


def kernel_fits(x: Sequence[int], weight: Sequence[int], stride, padding, dilation) -> bool:
    """Return whether every position of the kernel meets the map itself, not only padding, and the map is no smaller.

    Where this is not so, PyTorch's convolutions on a CPU may give wrong results or gradients, or crash.

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


def _plain(x: Tensor) -> Tensor:
    """Return x, of one channel, with strides that say [C, *S]: either format has it so in memory.

    PyTorch's convolutions in float32 on a CPU are wrong for some geometries where they say [*S, C].
    """
    return x.squeeze(1).unsqueeze(1)


def prepared(
    x: Tensor, weight: Tensor, stride, padding, dilation
) -> tuple[Tensor, Tensor, Sequence[int], Sequence[int]]:
    """Return the map, weight, padding and dilation to give PyTorch, which on a CPU avoid what it has wrong.

    The map has its padding where the kernel does not fit it. The dilation is 1 along a kernel of one, where all mean
    the same.
    """
    known = all(isinstance(size, int) for size in x.shape[2:])  # not so where a program is exported for any size
    if x.device.type != "cpu" or not known:
        return x, weight, padding, dilation
    dilation = [1 if k == 1 else d for k, d in zip(weight.shape[2:], dilation, strict=True)]
    if not kernel_fits(x.shape, weight.shape, stride, padding, dilation):
        x = functional.pad(x, [p for p in reversed(padding) for _ in range(2)])
        padding = [0] * len(padding)
    if x.shape[1] == 1:
        x, weight = _plain(x), _plain(weight)
    return x, weight, padding, dilation
