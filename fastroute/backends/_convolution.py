"""PyTorch's convolutions and dense layers, by the three products that cross-prediction needs of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastroute.ops._convolution import is_exact
from fastroute.ops._paths import accumulate_dtype


@dataclass(frozen=True)
class Convolution:
    """Cross-correlation of a geometry, or a dense layer where there is no space: x (N, C, *S), weight (C', C, *k).

    With `channels_last`, all results are [*S, C] in memory, and paths that are not are copied; else all are [C, *S].
    Results are in the type of the maps.
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    channels_last: bool

    def arrange(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if self.channels_last else x.contiguous()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dim() == 2:
            return torch.nn.functional.linear(x, weight, bias)
        dtype = self._dtype(x, weight)
        bias = None if bias is None else bias.to(dtype)
        y = torch.ops.aten.convolution(x.to(dtype), weight.to(dtype), bias, *self._geometry)
        return self.arrange(y.to(x.dtype))

    def to_inputs(self, grad: Tensor, like: Tensor, weight: Tensor) -> Tensor:
        """The gradient of inputs of the shape of `like`, whose values are not read."""
        if grad.dim() == 2:
            return grad @ weight
        return self.arrange(self._backward(grad, like, weight, [True, False, False])[0])

    def to_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the weight, whose values are not read."""
        if grad.dim() == 2:
            return grad.mT @ x
        return self._backward(grad, x, weight, [False, True, False])[1]

    @property
    def _geometry(self):
        return self.stride, self.padding, self.dilation, False, [0] * len(self.stride), 1

    def _backward(self, grad, x, weight, mask):
        dtype = self._dtype(x, weight)
        grads = torch.ops.aten.convolution_backward(
            grad.to(dtype), x.to(dtype), weight.to(dtype), None, *self._geometry, mask
        )
        return [grad if grad is None else grad.to(x.dtype) for grad in grads]

    def _dtype(self, x: Tensor, weight: Tensor) -> torch.dtype:
        """In which PyTorch computes: on a CPU its convolutions in half precision are wrong for some geometries."""
        geometry = self.stride, self.padding, self.dilation
        return x.dtype if is_exact(x, weight, *geometry) else accumulate_dtype(x.dtype)
