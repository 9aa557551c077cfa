"""Cross-prediction routing (§3.1, Alg. 1)."""

from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from fastroute.ops._library import below_autograd, call, define, implement_autograd
from fastroute.ops._paths import (
    DTYPES,
    MAX_PATHS,
    accumulate_dtype,
    align_like,
    align_paths,
    align_saved,
    check_activation,
    check_paths,
    check_tensors,
    check_weight,
    empty_map,
    empty_path,
    path_list,
)

FORMS = ("predict", "gate")
MAX_SIZE = 2**30  # of strides, paddings and dilations, so that products with sizes do not overflow


def cross_predict(
    xs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    gates: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str | None = "relu",
    *,
    form: str = "predict",
) -> list[Tensor]:
    """Route m parallel tensors to n by gated predictions from each to each (Alg. 1).

        U_ij = W_ij X_i + b_ij, a convolution or a dense layer     (Eq. 3.1)
        Y_j  = ReLU(Σ_i g_ij U_ij)                                 (Eq. 3.6)

    The m·n predictions are not saved for the backward, which uses <dY_j, U_ij> = <W_ijᵀ dY_j, X_i>. Second derivatives
    go through the reference backend in plain PyTorch.

    | argument | shape | type |
    |---|---|---|
    | xs | m tensors (N, C_in, *S), 1 ≤ m ≤ 8, up to three spatial sizes | float32, bfloat16, float16, float64 |
    | weight | (m, n, C_out, C_in, *k), a kernel size for each spatial size; 1 ≤ n ≤ 8 | the paths' or float32 |
    | bias | (m, n, C_out) or None | the paths' or float32 |
    | gates | (N, m, n) | the paths' or float32 |

    Args:
        stride, padding, dilation: as for `torch.nn.functional.conv2d`, but numbers only; dense layers ignore them.
        activation: "relu", or None for the plain sum.
        form: "predict" sums gated predictions, as in Alg. 1. "gate" predicts from gated inputs, one output at a time:
            conv(concat_i g_ij X_i; W_·j) + Σ_i g_ij b_ij, which is equal. On a CPU "predict" was as fast or faster in
            either format and precision. Both save the same tensors for the backward.

    Under autocast the paths and the weight are cast as for a convolution.

    Returns:
        n tensors (N, C_out, *S') of the paths' dtype and memory format. Differentiable in all tensors.

    Raises:
        TypeError: xs is not a list of floating-point tensors of one dtype, or a parameter has another dtype.
        ValueError: shapes, devices or memory formats do not match, an option is unknown, or there are more than 8
            paths.
        RuntimeError: the selected backend does not support these tensors.

    Example:
        >>> xs = [torch.randn(8, 16, 32, 32) for _ in range(2)]
        >>> weight, bias = torch.randn(2, 3, 32, 16, 3, 3), torch.zeros(2, 3, 32)
        >>> gates = torch.rand(8, 2, 3).softmax(-1)
        >>> ys = cross_predict(xs, weight, bias, gates, padding=1)
        >>> len(ys), ys[0].shape
        (3, torch.Size([8, 32, 32, 32]))
    """
    check_activation(activation)
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; it must be {' or '.join(map(repr, FORMS))}")
    xs = _autocast(path_list("xs", xs))
    check_tensors(weight=weight, gates=gates)
    rank = max(weight.dim() - 4, 0)
    geometry = [
        _per_dimension(name, value, rank, least) if rank else []
        for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1))
    ]
    return call(_FORWARD, xs, weight, bias, gates, *geometry, activation == "relu", form)


def _autocast(xs: list[Tensor]) -> list[Tensor]:
    """Cast the paths as autocast does for a convolution; the kernels cast the weight to the paths' dtype."""
    device = xs[0].device.type if xs else "cpu"
    # Meta tensors have no autocast. torch 2.11 cannot trace `torch.amp.is_autocast_available`, which reports that too.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return xs
    dtype = torch.get_autocast_dtype(device)
    return [x.to(dtype) if x.dtype in DTYPES and x.dtype != torch.float64 else x for x in xs]


def _per_dimension(name: str, value: int | Sequence[int], count: int, least: int) -> list[int]:
    if isinstance(value, (int, Integral)):
        values = [value] * count
    else:
        values = list(value) if isinstance(value, Iterable) else [value]
        if not all(isinstance(number, (int, Integral)) for number in values):
            raise TypeError(f"{name} is {value!r}; it must be an integer, or one for each of {count} spatial sizes")
    if len(values) != count:
        raise ValueError(f"{name} is {value}; it must be one number, or one for each of {count} spatial sizes")
    if any(not least <= number <= MAX_SIZE for number in values):
        raise ValueError(f"{name} is {value}; it must be at least {least} and at most {MAX_SIZE}")
    return values


def _prepare_forward(xs, weight, bias, gates, stride, padding, dilation, relu, form):
    check_paths("xs", xs)
    x, m = xs[0], len(xs)
    rank = x.dim() - 2
    if weight.dim() != 4 + rank or not 1 <= weight.shape[1] <= MAX_PATHS or 0 in weight.shape:
        kernel = ", *k" if rank else ""
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it must be (m, n, C_out, C_in{kernel}) = "
            f"({m}, n, C_out, {x.shape[1]}{kernel}), from m paths to n = 1 to {MAX_PATHS}, "
            f"with {rank} kernel sizes for paths of shape {tuple(x.shape)}"
        )
    n, width, _, *kernel = weight.shape[1:]
    check_weight("weight", weight, (m, n, width, x.shape[1], *kernel), x)
    if bias is not None:
        check_weight("bias", bias, (m, n, width), x)
    check_weight("gates", gates, (x.shape[0], m, n), x)
    for size, k, p, d in zip(x.shape[2:], kernel, padding, dilation, strict=True):
        if size + 2 * p < d * (k - 1) + 1:
            raise ValueError(
                f"xs[0] has shape {tuple(x.shape)}; with padding={list(padding)} and dilation={list(dilation)} it is "
                f"smaller than a kernel of {tuple(kernel)}"
            )
    return align_paths("xs", xs), weight, bias, gates, stride, padding, dilation, relu, form


def output_shape(x: Tensor, weight: Tensor, stride, padding, dilation) -> tuple[int, ...]:
    """Return the shape (N, C_out, *S') of an output."""
    sizes = zip(x.shape[2:], weight.shape[4:], stride, padding, dilation, strict=True)
    return x.shape[0], weight.shape[2], *((size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in sizes)


def _fake_forward(xs, weight, bias, gates, stride, padding, dilation, relu, form):
    shape = output_shape(xs[0], weight, stride, padding, dilation)
    return [empty_map(xs[0], shape) for _ in range(weight.shape[1])]


def _prepare_backward(grad_outputs, outputs, xs, *rest):
    xs = align_saved(xs)
    like = empty_map(xs[0], grad_outputs[0].shape)
    return align_like(grad_outputs, like), align_like(outputs, like), xs, *rest


def _fake_backward(grad_outputs, outputs, xs, weight, bias, gates, stride, padding, dilation, grad_inputs):
    def empty(shape):
        return gates.new_empty(shape, dtype=accumulate_dtype(xs[0].dtype))

    grad_xs = [empty_path(x) for x in xs] if grad_inputs else []
    return grad_xs, empty(weight.shape), empty((0,) if bias is None else bias.shape), empty(gates.shape)


_FORWARD = define("cross_predict", _prepare_forward, _fake_forward)

define("cross_predict_backward", _prepare_backward, _fake_backward)


class _CrossPredict(torch.autograd.Function):
    @staticmethod
    def forward(ctx, operators, weight, bias, gates, geometry, relu, form, *xs):
        given = xs[0] if xs else gates  # without paths the operator says so
        outputs = below_autograd(operators[0], given, list(xs), weight, bias, gates, *geometry, relu, form)
        ctx.backward_operator = operators[1]
        ctx.set_materialize_grads(False)
        ctx.geometry, ctx.m = geometry, len(xs)
        ctx.save_for_backward(weight, bias, gates, *xs, *(outputs if relu else ()))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, *grad_outputs):
        weight, bias, gates, *paths = ctx.saved_tensors
        xs, outputs = paths[: ctx.m], paths[ctx.m :]
        grad_inputs = any(ctx.needs_input_grad[7:])
        given = next((grad for grad in grad_outputs if grad is not None), None)
        if given is None:
            return (None,) * len(ctx.needs_input_grad)
        grad_outputs = [torch.zeros_like(given) if grad is None else grad for grad in grad_outputs]
        grad_xs, *grads = below_autograd(
            ctx.backward_operator, xs[0], grad_outputs, outputs, xs, weight, bias, gates, *ctx.geometry, grad_inputs
        )
        grads = [
            None if parameter is None else grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype)
            for parameter, grad in zip((weight, bias, gates), grads, strict=True)
        ]
        return None, *grads, None, None, None, *(grad_xs if grad_inputs else [None] * len(xs))


def _autograd(operators, xs, weight, bias, gates, stride, padding, dilation, relu, form):
    return list(_CrossPredict.apply(operators, weight, bias, gates, (stride, padding, dilation), relu, form, *xs))


implement_autograd("cross_predict", _autograd)
