"""The cross-prediction layers (§3.1)."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from fastroute.nn.blocks import block_end
from fastroute.nn.router import Router, Routing
from fastroute.ops import cross_predict, gate
from fastroute.ops._paths import check_activation, check_integers

_RELU = nn.ReLU()


class _CrossPrediction(Router):
    """Base of the layers, for any number of kernel dimensions; none for dense predictions."""

    WIDTHS: tuple[str, str]  # the names of C_in and C_out among the arguments

    def __init__(
        self,
        in_width: int,
        out_width: int,
        kernel: tuple[int, ...],
        in_paths: int,
        out_paths: int,
        bias: bool,
        gate_channels: int | None,
        norm_layer: Callable[[int], nn.Module] | None,
        activation: str | None,
        temperature: float,
        gate_norm: str | None,
        prior: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        for name, width in zip(self.WIDTHS, (in_width, out_width), strict=True):
            check_integers(**{name: width})
            if width < 1:
                raise ValueError(f"{name} is {width}; it must be at least 1")
        check_activation(activation)
        super().__init__(
            in_width, in_paths, out_paths, gate_channels, True, temperature, gate_norm, prior, device, dtype
        )
        shape = (in_paths, out_paths, out_width, in_width, *kernel)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(shape[:3], device=device, dtype=dtype)) if bias else None
        self.norms = None
        if norm_layer is not None:
            norms = nn.ModuleList(norm_layer(out_width) for _ in range(out_paths))
            self.norms = norms.to(device=device, dtype=dtype)
        self.activation = activation
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise each prediction as `nn.Conv2d` and `nn.Linear` do, and the gates near 1/n."""
        super().reset_parameters()
        bound = 1 / math.sqrt(math.prod(self.weight.shape[3:]))  # equals their Kaiming-uniform bound
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def _route(self, xs: Sequence[Tensor], return_routing: bool, **convolution):
        xs = self._checked(xs, self.weight.shape[3], self.WIDTHS[0])
        if self.training and self.gate_norm is not None:
            routing = self._normalized(xs)
        else:
            routing = self._routing(*gate(xs, *self._gate()))
        gates = routing.gates
        if self.norms is None:
            outputs = cross_predict(xs, self.weight, self.bias, gates, **convolution, activation=self.activation)
        else:
            outputs = cross_predict(xs, self.weight, self.bias, gates, **convolution, activation=None)
            end = _RELU if self.activation else None
            outputs = [block_end(norm, y, end=end) for norm, y in zip(self.norms, outputs, strict=True)]
        return (outputs, routing) if return_routing else outputs

    def extra_repr(self) -> str:
        m, n, out_width, in_width, *kernel = self.weight.shape
        bias = "" if self.bias is not None else ", bias=False"
        kernel = f", kernel_size={tuple(kernel)}" if kernel else ""
        return (
            f"{in_width}, {out_width}{kernel}, in_paths={m}, out_paths={n}, gate_channels={self.gate_channels}{bias}, "
            f"activation={self.activation!r}"
        )


class CrossPrediction2d(_CrossPrediction):
    """Route m parallel feature maps to n by gated convolutions from every input to every output (§3.1, Alg. 1).

    For each input path i and output path j, with its own weights:

        U_ij = W_ij X_i + b_ij, a convolution           (Eq. 3.1)
        G_i = softmax((W2_i ReLU(W1_i Z_i + b1_i) + b2_i) / T), Z_i = mean of X_i over space   (Eq. 3.2 to 3.5)
        Y_j = ReLU(Σ_i g_ij U_ij)                       (Eq. 3.6)

    With `norm_layer`, each output is normalised between the sum and the activation. The predictions are initialised as
    in `nn.Conv2d`, and the second layer of the gates near zero, so that training starts with even gates: 1/n each.

    Args:
        in_channels: C_in, the channels of every incoming path.
        out_channels: C_out, the channels of every outgoing path.
        kernel_size: the height and width of the kernels.
        in_paths: m, 1 to 8. A one-to-many layer has `in_paths=1`.
        out_paths: n, 1 to 8.
        stride, padding, dilation: as in `nn.Conv2d`, but numbers only.
        bias: whether each prediction has a bias b_ij, which is gated with it.
        gate_channels: G, the width of the gate's hidden layer. None or 0 omits it (Eq. 3.9).
        norm_layer: called with C_out for each output, such as `nn.BatchNorm2d`; None for none.
        activation: "relu", or None for none.
        temperature, gate_norm, prior: of the gates' softmax, as in `CrossConnection`.
        device, dtype: of the parameters.

    Parameters: weight (m, n, C_out, C_in, kH, kW), bias (m, n, C_out), and the gate's w1 (m, G, C_in), b1 (m, G),
    w2 (m, n, G), b2 (m, n). Without a hidden layer, w2 is (m, n, C_in), and w1 and b1 are None.

    Shape:
        xs: list of m tensors (N, C_in, H, W) of one dtype and memory format.
        output: list of n tensors (N, C_out, H', W'), with H' and W' as in `nn.Conv2d`. With `return_routing=True` also
            the `Routing`.

    Example:
        >>> layer = CrossPrediction2d(16, 32, 3, in_paths=2, out_paths=2, padding=1, norm_layer=torch.nn.BatchNorm2d)
        >>> ys, routing = layer([torch.randn(8, 16, 32, 32) for _ in range(2)], return_routing=True)
        >>> len(ys), ys[0].shape, routing.gates.shape
        (2, torch.Size([8, 32, 32, 32]), torch.Size([8, 2, 2]))

    Raises:
        TypeError: xs is not a list of floating-point tensors.
        ValueError: an argument is out of range, or xs has another number of paths or channels than the layer.
    """

    WIDTHS = ("in_channels", "out_channels")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        in_paths: int,
        out_paths: int,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        gate_channels: int | None = 16,
        norm_layer: Callable[[int], nn.Module] | None = None,
        activation: str | None = "relu",
        *,
        temperature: float = 1.0,
        gate_norm: str | None = None,
        prior: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_channels,
            out_channels,
            _pair_of_integers("kernel_size", kernel_size, 1),
            in_paths,
            out_paths,
            bias,
            gate_channels,
            norm_layer,
            activation,
            temperature,
            gate_norm,
            prior,
            device,
            dtype,
        )
        self.stride, self.padding = _pair_of_integers("stride", stride, 1), _pair_of_integers("padding", padding, 0)
        self.dilation = _pair_of_integers("dilation", dilation, 1)

    def forward(
        self, xs: Sequence[Tensor], return_routing: bool = False
    ) -> list[Tensor] | tuple[list[Tensor], Routing]:
        return self._route(xs, return_routing, stride=self.stride, padding=self.padding, dilation=self.dilation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, stride={self.stride}, padding={self.padding}, dilation={self.dilation}"


def _pair_of_integers(name: str, value: int | tuple[int, int], least: int) -> tuple[int, int]:
    """Return the value for height and width; raise unless they are integers of at least `least`."""
    values = tuple(_pair(value))
    whole = all(isinstance(number, Integral) and not isinstance(number, bool) for number in values)
    if len(values) != 2 or not whole or min(values) < least:
        raise ValueError(
            f"{name} is {value!r}; it must be an integer, or one for each of height and width, from {least} on"
        )
    return int(values[0]), int(values[1])


class CrossPredictionLinear(_CrossPrediction):
    """Route m parallel vectors to n by gated dense layers from every input to every output (§3.1, Alg. 1).

    Same as `CrossPrediction2d` with dense predictions U_ij = W_ij X_i + b_ij. The gates are computed from X_i itself,
    since there is nothing to pool.

    Args:
        in_features: C_in, the features of every incoming path.
        out_features: C_out, the features of every outgoing path.
        in_paths, out_paths, bias, gate_channels, norm_layer, activation, temperature, gate_norm, prior, device, dtype:
            as in `CrossPrediction2d`.

    Parameters: weight (m, n, C_out, C_in), bias (m, n, C_out), and the gate's w1, b1, w2, b2.

    Shape:
        xs: list of m tensors (N, C_in) of one dtype.
        output: list of n tensors (N, C_out). With `return_routing=True` also the `Routing`.

    Example:
        >>> layer = CrossPredictionLinear(64, 32, in_paths=2, out_paths=3)
        >>> ys, routing = layer([torch.randn(8, 64) for _ in range(2)], return_routing=True)
        >>> len(ys), ys[0].shape, routing.gates.shape
        (3, torch.Size([8, 32]), torch.Size([8, 2, 3]))

    Raises:
        TypeError: xs is not a list of floating-point tensors.
        ValueError: an argument is out of range, or xs has another number of paths or features than the layer.
    """

    WIDTHS = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        in_paths: int,
        out_paths: int,
        bias: bool = True,
        gate_channels: int | None = 16,
        norm_layer: Callable[[int], nn.Module] | None = None,
        activation: str | None = "relu",
        *,
        temperature: float = 1.0,
        gate_norm: str | None = None,
        prior: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            in_features,
            out_features,
            (),
            in_paths,
            out_paths,
            bias,
            gate_channels,
            norm_layer,
            activation,
            temperature,
            gate_norm,
            prior,
            device,
            dtype,
        )

    def forward(
        self, xs: Sequence[Tensor], return_routing: bool = False
    ) -> list[Tensor] | tuple[list[Tensor], Routing]:
        return self._route(xs, return_routing)
