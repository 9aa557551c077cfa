"""What PyTorch's convolutions are given, so that they are right."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


def kernel_fits(x: Sequence[int], weight: Sequence[int], stride, padding, dilation) -> bool:
    """Whether every position of the kernel meets the map itself, and not padding alone, and the map is no smaller.

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


def plain(x: Tensor) -> Tensor:
    """x with strides that say [C, *S] where there is one channel, which is both formats.

    PyTorch's convolutions in float32 on a CPU are wrong for some geometries where they say [*S, C].
    """
    return x.squeeze(1).unsqueeze(1) if x.shape[1] == 1 else x


def prepared(x: Tensor, weight: Tensor, stride, padding, dilation) -> tuple[Tensor, Tensor, list[int]]:
    """The map, weight and padding to give PyTorch: on a CPU the map has its padding where the kernel does not fit."""
    known = all(isinstance(size, int) for size in x.shape[2:])  # not so where a program is exported for any size
    if x.device.type != "cpu" or not known:
        return x, weight, list(padding)
    if not kernel_fits(x.shape, weight.shape, stride, padding, dilation):
        x = functional.pad(x, [p for p in reversed(padding) for _ in range(2)])
        padding = [0] * len(padding)
    return plain(x), plain(weight), list(padding)
