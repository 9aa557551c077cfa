"""The cross-connection layer (§3.2)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastroute.nn.router import Router, Routing
from fastroute.ops import cross_connect, mix
from fastroute.ops._paths import check_activation, check_integers


class CrossConnection(Router):
    """Route m parallel tensors to n by gates computed from the tensors themselves (§3.2, Alg. 2).

    For each input path i, with its own weights:

        Z_i = mean of X_i over space                    (Eq. 3.3)
        A_i = W2_i ReLU(W1_i Z_i + b1_i) + b2_i         (Eq. 3.4)
        G_i = softmax(A_i / T)                          (Eq. 3.5, where T = 1)
        Y_j = Σ_i g_ij X_i                              (Eq. 3.7)

    The second layer is initialised near zero, so that training starts with even gates: 1/n each.

    Args:
        channels: C, the channels of every path.
        in_paths: m, 1 to 8. A one-to-many router has `in_paths=1`.
        out_paths: n, 1 to 8.
        gate_channels: G, the width of the gate's hidden layer. None or 0 omits it: A_i = W2_i Z_i + b2_i, the linear
            gate of Eq. 3.9.
        bias: whether the gate's layers have biases.
        activation: "relu" routes ReLU(X_i) instead of X_i, for paths that would end in a ReLU. The kernels apply it
            while reading and store nothing for it, except in training with `gate_norm`, which keeps ReLU(X_i). None
            routes the paths as they are.
        temperature: T > 0, an attribute that may be changed at any time: high for even gates, low for sharp ones.
        gate_norm: "center" or "standardize": the gates are softmax(A* / T), with A* the scores normalised over the
            batch in training and by running statistics in evaluation (Eq. 4.11, 4.20); see `GateNorm`. None: A* is A.
        prior: "learned" with a gate_norm: the gates are posteriors with the running mean gates as priors (Eq. 4.18).
        device, dtype: of the parameters.

    Parameters: w1 (m, G, C), b1 (m, G), w2 (m, n, G), b2 (m, n). Without a hidden layer, w2 is (m, n, C), and w1 and b1
    are None.

    Shape:
        xs: list of m tensors (N, C, *S) of one dtype and memory format, with up to three spatial sizes.
        output: list of n tensors (N, C, *S), in the dtype and memory format of the inputs. With `return_routing=True`
            also the `Routing`.

    Example:
        >>> router = CrossConnection(64, in_paths=2, out_paths=3)
        >>> xs = [torch.randn(8, 64, 16, 16) for _ in range(2)]
        >>> ys = router(xs)
        >>> ys, routing = router(xs, return_routing=True)
        >>> len(ys), ys[0].shape, routing.gates.shape
        (3, torch.Size([8, 64, 16, 16]), torch.Size([8, 2, 3]))

    Raises:
        TypeError: xs is not a list of floating-point tensors.
        ValueError: an argument is out of range, or xs has another number of paths or channels than the router.
    """

    def __init__(
        self,
        channels: int,
        in_paths: int,
        out_paths: int,
        gate_channels: int | None = 16,
        bias: bool = True,
        *,
        activation: str | None = None,
        temperature: float = 1.0,
        gate_norm: str | None = None,
        prior: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_integers(channels=channels)
        if channels < 1:
            raise ValueError(f"channels is {channels}; it must be at least 1")
        check_activation(activation)
        super().__init__(
            channels, in_paths, out_paths, gate_channels, bias, temperature, gate_norm, prior, device, dtype
        )
        self.channels, self.activation = channels, activation
        self.reset_parameters()

    def forward(
        self, xs: Sequence[Tensor], return_routing: bool = False
    ) -> list[Tensor] | tuple[list[Tensor], Routing]:
        xs = self._checked(xs, self.channels, "channels")
        if self.training and self.gate_norm is not None:
            if self.activation == "relu":
                xs = [torch.relu(x) for x in xs]
            routing = self._normalized(xs)
            outputs = mix(xs, routing.gates)
            return (outputs, routing) if return_routing else outputs
        outputs, gates, scores = cross_connect(xs, *self._gate(), self.activation)
        return (outputs, self._routing(gates, scores)) if return_routing else outputs

    def extra_repr(self) -> str:
        bias = "" if self.b2 is not None else ", bias=False"
        activation = "" if self.activation is None else f", activation={self.activation!r}"
        temperature = "" if self.temperature == 1 else f", temperature={self.temperature}"
        return (
            f"{self.channels}, in_paths={self.in_paths}, out_paths={self.out_paths}, "
            f"gate_channels={self.gate_channels}{bias}{activation}{temperature}"
        )
