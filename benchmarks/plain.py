"""Cross-connection routing as a user of PyTorch would write it: lists, `mean`, `softmax` and Python sums."""

import torch


def cross_connect(xs, w1, b1, w2, b2):
    gates = []
    for i, x in enumerate(xs):
        pooled = x.float().mean((2, 3)) if x.dtype != torch.float32 else x.mean((2, 3))
        hidden = torch.relu(torch.nn.functional.linear(pooled, w1[i], b1[i]))
        gates.append(torch.softmax(torch.nn.functional.linear(hidden, w2[i], b2[i]), dim=-1))
    outputs = []
    for j in range(w2.shape[1]):
        outputs.append(sum(g[:, j, None, None, None].to(x.dtype) * x for g, x in zip(gates, xs, strict=True)))
    return outputs
