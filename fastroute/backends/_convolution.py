"""PyTorch's convolutions and dense layers: the forward and the two gradients that cross-prediction needs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastroute.ops._convolution import Geometry, correct_geometry


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
        geometry = self._geometry(x, weight)
        x, weight = geometry.prepare(x, weight)
        return self.arrange(torch.ops.aten.convolution(x, weight, bias, *geometry[:3], *self._constants))

    def input_gradient(self, grad: Tensor, like: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the inputs; `like` gives their shape, and its values are not read."""
        if grad.dim() == 2:
            return grad @ weight
        geometry = self._geometry(like, weight)
        grad_x = self._backward(grad, like, weight, geometry, [True, False, False])[0]
        return self.arrange(geometry.restore(grad_x, like.shape[2:]))

    def weight_gradient(self, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of the weight; `weight` gives its shape, and its values are not read."""
        if grad.dim() == 2:
            return grad.mT @ x
        return self._backward(grad, x, weight, self._geometry(x, weight), [False, True, False])[1]

    @property
    def _constants(self):
        """Arguments transposed, output_padding and groups."""
        return False, [0] * len(self.stride), 1

    def _geometry(self, x: Tensor, weight: Tensor) -> Geometry:
        return correct_geometry(x, weight, self.stride, self.padding, self.dilation)

    def _backward(self, grad, x, weight, geometry, mask):
        x, weight = geometry.prepare(x, weight)
        return torch.ops.aten.convolution_backward(grad, x, weight, None, *geometry[:3], *self._constants, mask)
