"""PyTorch's convolutions and dense layers: the forward and the two gradients that cross-prediction needs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastroute.ops._convolution import correct_geometry, prepare_convolution


@dataclass(frozen=True)
class Convolution:
    """A convolution of x (N, C, *S) with weight (C', C, *k), or a dense layer if there are no spatial dimensions.

    With `channels_last`, results are [*S, C] in memory, and paths in another format are copied; else they are [C, *S].
    """

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    channels_last: bool

    def arrange(self, x: Tensor) -> Tensor:
        """Return x in the memory format of the convolution."""
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if self.channels_last else x.contiguous()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dim() == 2:
            return torch.nn.functional.linear(x, weight, bias)
        x, weight, *geometry = prepare_convolution(x, weight, self.stride, self.padding, self.dilation)
        return self.arrange(torch.ops.aten.convolution(x, weight, bias, *geometry, *self._constants))

    def input_gradient(self, grad: Tensor, like: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the inputs; `like` gives their shape, and its values are not read."""
        if grad.dim() == 2:
            return grad @ weight
        grad_x = self._backward(grad, like, weight, [True, False, False])[0]
        geometry = correct_geometry(like, weight, self.stride, self.padding, self.dilation)
        return self.arrange(geometry.restore(grad_x, like.shape[2:]))

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the weight; `weight` gives its shape, and its values are not read."""
        if grad.dim() == 2:
            return grad.mT @ x
        return self._backward(grad, x, weight, [False, True, False])[1]

    @property
    def _constants(self):
        """Arguments transposed, output_padding and groups."""
        return False, [0] * len(self.stride), 1

    def _backward(self, grad, x, weight, mask):
        x, weight, *geometry = prepare_convolution(x, weight, self.stride, self.padding, self.dilation)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry, *self._constants, mask)
