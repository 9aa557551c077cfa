"""PyTorch's convolutions and dense layers, by the three products that cross-prediction needs of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastroute.ops._convolution import prepare_convolution


@dataclass(frozen=True)
class Convolution:
    """Cross-correlation of a geometry, or a dense layer where there is no space: x (N, C, *S), weight (C', C, *k).

    With `channels_last`, all results are [*S, C] in memory, and paths that are not are copied; else all are [C, *S].
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
        x, weight, *geometry = prepare_convolution(x, weight, self.stride, self.padding, self.dilation)
        return self.arrange(torch.ops.aten.convolution(x, weight, bias, self.stride, *geometry, *self._rest))

    def to_inputs(self, grad: Tensor, like: Tensor, weight: Tensor) -> Tensor:
        """The gradient of inputs of the shape of `like`, whose values are not read."""
        if grad.dim() == 2:
            return grad @ weight
        grad_x = self._backward(grad, like, weight, [True, False, False])[0]
        for dim, (size, padding) in enumerate(zip(like.shape[2:], self.padding, strict=True), start=2):
            if grad_x.shape[dim] > size:  # of a map with its padding
                grad_x = grad_x.narrow(dim, padding, size)
        return self.arrange(grad_x)

    def to_weight(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the weight, whose values are not read."""
        if grad.dim() == 2:
            return grad.mT @ x
        return self._backward(grad, x, weight, [False, True, False])[1]

    @property
    def _rest(self):
        """Not transposed, without output padding, in one group."""
        return False, [0] * len(self.stride), 1

    def _backward(self, grad, x, weight, mask):
        x, weight, *geometry = prepare_convolution(x, weight, self.stride, self.padding, self.dilation)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, self.stride, *geometry, *self._rest, mask)
