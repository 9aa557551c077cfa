"""Workarounds for wrong results of PyTorch's convolutions on a CPU."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional


def kernel_fits(x: Sequence[int], weight: Sequence[int], stride, padding, dilation) -> bool:
    """Return whether each kernel position reads the map itself, not only padding, and the kernel fits in the map.

    Otherwise, PyTorch's convolutions on a CPU may give wrong results or gradients, or crash.

    Args:
        x, weight: the shapes (N, C, *S) and (C', C, *k).
    """
    for size, k, s, p, d in zip(x[2:], weight[2:], stride, padding, dilation, strict=True):
        reach = d * (k - 1)
        if reach >= size:
            return False
        last = (size + 2 * p - reach - 1) // s
        for first in (position * d - p for position in range(k)):  # what it reads for the first output
            output = max(0, -(first // s))  # the first output for which it reads the map
            if output > last or output * s + first >= size:
                return False
    return True


def _with_channels_first_strides(x: Tensor) -> Tensor:
    """Return x, of one channel, with the strides of [C, *S]; with one channel, both formats are the same in memory.

    PyTorch's float32 convolutions on a CPU are wrong for some geometries if the strides are those of [*S, C].
    """
    return x.squeeze(1).unsqueeze(1)


def prepare_convolution(
    x: Tensor, weight: Tensor, stride, padding, dilation
) -> tuple[Tensor, Tensor, Sequence[int], Sequence[int]]:
    """Return the map, weight, padding and dilation with which PyTorch's convolution is right, also on a CPU.

    Where the kernel does not fit the map, the map is padded first. The dilation is set to 1 along a kernel of size 1,
    where it has no effect.
    """
    known = all(isinstance(size, int) for size in x.shape[2:])  # sizes are symbolic in torch.export
    if x.device.type != "cpu" or not known:
        return x, weight, padding, dilation
    dilation = [1 if k == 1 else d for k, d in zip(weight.shape[2:], dilation, strict=True)]
    if not kernel_fits(x.shape, weight.shape, stride, padding, dilation):
        x = functional.pad(x, [p for p in reversed(padding) for _ in range(2)])
        padding = [0] * len(padding)
    if x.shape[1] == 1:
        x, weight = _with_channels_first_strides(x), _with_channels_first_strides(weight)
    return x, weight, padding, dilation
