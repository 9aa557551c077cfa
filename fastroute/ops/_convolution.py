"""Workarounds for wrong results of PyTorch's convolutions on a CPU."""

from collections.abc import Sequence
from typing import NamedTuple

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


class Geometry(NamedTuple):
    """The geometry with which PyTorch's convolution is right, and the map that it needs.

    Attributes:
        stride, padding, dilation: arguments of the convolution of the prepared map.
        sides: the zeros to add on both sides of each spatial size of the map; None leaves the map as it is.
        kept: then the number of positions to keep of each size, from the first; None keeps all.
    """

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    sides: Sequence[int] | None = None
    kept: Sequence[int | None] = ()

    def prepare(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map and the weight to convolve it with."""
        if self.sides is not None:
            x = functional.pad(x, [side for side in reversed(self.sides) for _ in range(2)])
            for dim, kept in enumerate(self.kept, start=2):
                if kept is not None:
                    x = x.narrow(dim, 0, kept)
        if x.device.type == "cpu" and x.shape[1] == weight.shape[1] == 1:
            x, weight = _with_channels_first_strides(x), _with_channels_first_strides(weight)
        return x, weight

    def restore(self, grad: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the gradient of a map of these spatial sizes from that of the prepared one."""
        if self.sides is None:
            return grad
        for dim, (size, side) in enumerate(zip(sizes, self.sides, strict=True), start=2):
            cut = size + 2 * side - grad.shape[dim]
            if cut:
                grad = functional.pad(grad, [0, 0] * (grad.dim() - 1 - dim) + [0, cut])
            grad = grad.narrow(dim, side, size)
        return grad


def correct_geometry(x: Tensor, weight: Tensor, stride, padding, dilation) -> Geometry:
    """Return how to convolve x (N, C, *S) with weight (C', C, *k) such that PyTorch is right, also on a CPU.

    - Where the kernel does not fit the map, the map is padded first.
    - The dilation is set to 1 along a kernel of size 1, where it has no effect.
    - A stride above 1 has no effect along a size with a single output, where bfloat16 convolutions are wrong on
      processors with AMX: it is set to 1, and the map cut to the positions that the kernel reads.
    """
    sizes, kernel = x.shape[2:], weight.shape[2:]
    known = all(isinstance(size, int) for size in sizes)  # sizes are symbolic in torch.export
    if x.device.type != "cpu" or not known:
        return Geometry(stride, padding, dilation)
    if max(dilation) > 1:
        dilation = [1 if k == 1 else d for k, d in zip(kernel, dilation, strict=True)]
    fits = kernel_fits(x.shape, weight.shape, stride, padding, dilation)
    if fits and max(stride) == 1:
        return Geometry(stride, padding, dilation)
    read = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    each = zip(sizes, read, stride, padding, strict=True)
    single = [s > 1 and (size + 2 * p - reads) // s == 0 for size, reads, s, p in each]
    if fits and not any(single):
        return Geometry(stride, padding, dilation)
    padded = [one or not fits for one in single]
    return Geometry(
        stride=[1 if one else s for one, s in zip(single, stride, strict=True)],
        padding=[0 if pads else p for pads, p in zip(padded, padding, strict=True)],
        dilation=dilation,
        sides=[p if pads else 0 for pads, p in zip(padded, padding, strict=True)],
        kept=[reads if one else None for one, reads in zip(single, read, strict=True)],
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int = 1) -> Tensor:
    """Convolve x (N, C, *S) as `torch.nn.functional.conv2d` does, and correctly; one number for each spatial size."""
    geometry = correct_geometry(x, weight, stride, padding, dilation)
    x, weight = geometry.prepare(x, weight)
    function = (functional.conv1d, functional.conv2d, functional.conv3d)[x.dim() - 3]
    return function(x, weight, bias, *geometry[:3], groups)
