"""The operators in plain PyTorch, as a user would write them: lists, `mean`, `softmax` and Python sums."""

import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear

from fastroute.nn import CrossConnection, CrossPrediction2d
from fastroute.nn.cross_connection import Routing


def mix(xs: list[Tensor], gates: Tensor) -> list[Tensor]:
    """Compute Eq. 3.7, with gates (N, m, n)."""
    return _weighted_sums(xs, gates.unbind(1))


def cross_connect(xs: list[Tensor], w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> list[Tensor]:
    """Compute Alg. 2, with the gates in the dtype of the weights."""
    return _weighted_sums(xs, _gates(xs, w1, b1, w2, b2)[0])


def cross_predict(
    xs: list[Tensor], weight: Tensor, bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> list[Tensor]:
    """Compute Alg. 1 with its gates, by 3 × 3 convolutions that keep the map size."""
    dtype = xs[0].dtype
    predictions = []
    for x, weights, biases in zip(xs, weight.to(dtype), bias.to(dtype), strict=True):
        predictions.append([conv2d(x, w, b, padding=1) for w, b in zip(weights, biases, strict=True)])
    gates = [g[:, :, None, None, None].to(dtype) for g in _gates(xs, w1, b1, w2, b2)[0]]
    outputs = []
    for j in range(weight.shape[1]):
        outputs.append(torch.relu(sum(g[:, j] * u[j] for g, u in zip(gates, predictions, strict=True))))
    return outputs


def _gates(xs, w1, b1, w2, b2):
    gates, scores = [], []
    for i, x in enumerate(xs):
        pooled = x.to(w1.dtype)
        if x.dim() > 2:
            pooled = pooled.mean(tuple(range(2, x.dim())))
        hidden = torch.relu(linear(pooled, w1[i], b1[i]))
        scores.append(linear(hidden, w2[i], b2[i]))
        gates.append(torch.softmax(scores[-1], dim=-1))
    return gates, scores


def _weighted_sums(xs, gates):
    outputs = []
    for j in range(gates[0].shape[1]):
        outputs.append(sum(_spread(g[:, j], x) * x for g, x in zip(gates, xs, strict=True)))
    return outputs


def _spread(gate, x):
    """Return the gate (N,) in the dtype of x (N, …), with as many dimensions."""
    return gate.reshape(-1, *[1] * (x.dim() - 1)).to(x.dtype)


class PlainCrossConnection(CrossConnection):
    """`CrossConnection` in plain PyTorch. Gates and scores of its `Routing` are lists, since they are not used here."""

    def forward(self, xs, return_routing=False):
        if self.activation:
            xs = [torch.relu(x) for x in xs]
        gates, scores = _gates(xs, self.w1, self.b1, self.w2, self.b2)
        outputs = _weighted_sums(xs, gates)
        return (outputs, Routing(gates, scores)) if return_routing else outputs


class PlainCrossPrediction2d(CrossPrediction2d):
    """`CrossPrediction2d` in plain PyTorch: Alg. 1 as written, which stores all m·n predictions."""

    def forward(self, xs, return_routing=False):
        gates, scores = _gates(xs, self.w1, self.b1, self.w2, self.b2)
        outputs = []
        for j in range(self.weight.shape[1]):
            y = 0
            for i, x in enumerate(xs):
                bias = None if self.bias is None else self.bias[i, j]
                u = conv2d(x, self.weight[i, j], bias, self.stride, self.padding, self.dilation)
                y = y + _spread(gates[i][:, j], u) * u
            y = y if self.norms is None else self.norms[j](y)
            outputs.append(torch.relu(y) if self.activation else y)
        return (outputs, Routing(gates, scores)) if return_routing else outputs
