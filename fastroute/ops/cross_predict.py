"""Cross-prediction routing (§3.1, Alg. 1): outputs are gated sums of predictions that every input makes for them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastroute.ops._paths import check_paths, path_list


def cross_predict(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    gates: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str | None = "relu",
) -> list[Tensor]:
    """Y_j = ReLU(Σ_i g_ij (W_ij X_i + b_ij)), W_ij being a convolution or a dense layer (Eq. 3.1, 3.6; Alg. 1)."""
    xs = path_list("xs", xs)
    check_paths("xs", xs)
    x, (m, n) = xs[0], weight.shape[:2]
    outputs = []
    for j in range(n):
        terms = []
        for i in range(m):
            w, b = weight[i, j].to(x.dtype), None if bias is None else bias[i, j].to(x.dtype)
            if weight.dim() == 4:
                u = torch.nn.functional.linear(xs[i], w, b)
            else:
                convolve = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)
                u = convolve[weight.dim() - 5](xs[i], w, b, stride, padding, dilation)
            terms.append(gates[:, i, j].reshape(-1, *[1] * (u.dim() - 1)).to(x.dtype) * u)
        y = sum(terms)
        outputs.append(torch.relu(y) if activation == "relu" else y)
    return outputs
