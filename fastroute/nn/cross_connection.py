"""Cross-connection routing as a layer (§3.2)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastroute.nn._temperature import Tempered
from fastroute.ops import cross_connect
from fastroute.ops._paths import MAX_PATHS, path_list


class Routing(NamedTuple):
    """What a router decided for each sample.

    gates: (N, m, n); `gates[s, i, j]` is the weight of input i in output j, and each row i sums to 1.
    scores: (N, m, n), the relevance scores A, before the temperature and softmax.
    """

    gates: Tensor
    scores: Tensor


class CrossConnection(Tempered, nn.Module):
    """Route m parallel tensors to n by gates that the tensors themselves compute (§3.2, Alg. 2).

    For each input path i, with its own weights:

        Z_i = mean of X_i over space                    (Eq. 3.3)
        A_i = W2_i ReLU(W1_i Z_i + b1_i) + b2_i         (Eq. 3.4)
        G_i = softmax(A_i / T)                          (Eq. 3.5, where T = 1)
        Y_j = Σ_i g_ij X_i                              (Eq. 3.7)

    The second layer starts near zero, so that training starts from even gates: 1/n each.

    Args:
        channels: C, the channels of every path.
        in_paths: m, 1 to 8. A one-to-many router has `in_paths=1`.
        out_paths: n, 1 to 8.
        gate_channels: G, the width of the gate's hidden layer. None or 0 leaves that out: A_i = W2_i Z_i + b2_i, the
            linear gate of Eq. 3.9.
        bias: whether the gate's layers have biases.
        temperature: T > 0, an attribute that may be changed at any time: high for even gates, low for sharp ones.

    Parameters: w1 (m, G, C), b1 (m, G), w2 (m, n, G), b2 (m, n); w2 is (m, n, C), and w1 and b1 are None, without a
    hidden layer.

    Shape:
        xs: list of m tensors (N, C, *S) of one dtype and memory format, with up to three spatial sizes.
        output: list of n tensors (N, C, *S), in the dtype and memory format of the inputs.

    Example:
        >>> router = CrossConnection(64, in_paths=2, out_paths=3)
        >>> xs = [torch.randn(8, 64, 16, 16) for _ in range(2)]
        >>> ys = router(xs)
        >>> ys, routing = router(xs, return_routing=True)
        >>> len(ys), ys[0].shape, routing.gates.shape
        (3, torch.Size([8, 64, 16, 16]), torch.Size([8, 2, 3]))

    Raises:
        TypeError: xs is not a list of floating-point tensors.
        ValueError: an argument is out of its range, or xs has another number of paths or channels than the router.
    """

    def __init__(
        self,
        channels: int,
        in_paths: int,
        out_paths: int,
        gate_channels: int | None = 16,
        bias: bool = True,
        *,
        temperature: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels is {channels}; it must be at least 1")
        for name, paths in (("in_paths", in_paths), ("out_paths", out_paths)):
            if not 1 <= paths <= MAX_PATHS:
                raise ValueError(f"{name} is {paths}; it must be 1 to {MAX_PATHS}")
        if gate_channels is not None and gate_channels < 0:
            raise ValueError(f"gate_channels is {gate_channels}; it must be at least 1, or None for a linear gate")
        self.channels, self.in_paths, self.out_paths = channels, in_paths, out_paths
        self.gate_channels = gate_channels or None
        self.temperature = temperature

        def parameter(*shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        hidden = self.gate_channels is not None
        self.w1 = parameter(in_paths, gate_channels, channels) if hidden else None
        self.b1 = parameter(in_paths, gate_channels) if hidden and bias else None
        self.w2 = parameter(in_paths, out_paths, gate_channels if hidden else channels)
        self.b2 = parameter(in_paths, out_paths) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the first layer as `nn.Linear` does, and the second near zero: gates within about 0.001 of 1/n."""
        bound = 1 / math.sqrt(self.channels)  # nn.Linear's Kaiming-uniform comes to this, for weight and bias
        for parameter in (self.w1, self.b1):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)
        nn.init.normal_(self.w2, std=0.001)
        if self.b2 is not None:
            nn.init.zeros_(self.b2)

    def forward(
        self, xs: Sequence[Tensor], return_routing: bool = False
    ) -> list[Tensor] | tuple[list[Tensor], Routing]:
        xs = path_list("xs", xs)
        if len(xs) != self.in_paths:
            raise ValueError(f"xs has {len(xs)} paths; this router takes in_paths={self.in_paths}")
        if xs[0].dim() < 2 or xs[0].shape[1] != self.channels:
            raise ValueError(
                f"xs[0] has shape {tuple(xs[0].shape)}; it must be (N, C, *S) with channels={self.channels}"
            )
        w2, b2, temperature = self.w2, self.b2, self.temperature
        if temperature != 1:  # the scores are linear in the second layer, so the operator need not know
            w2, b2 = w2 / temperature, None if b2 is None else b2 / temperature
        outputs, gates, scores = cross_connect(xs, self.w1, self.b1, w2, b2)
        if temperature != 1 and return_routing:
            scores = scores * temperature
        return (outputs, Routing(gates, scores)) if return_routing else outputs

    def extra_repr(self) -> str:
        bias = "" if self.b2 is not None else ", bias=False"
        temperature = "" if self.temperature == 1 else f", temperature={self.temperature}"
        return (
            f"{self.channels}, in_paths={self.in_paths}, out_paths={self.out_paths}, "
            f"gate_channels={self.gate_channels}{bias}{temperature}"
        )
