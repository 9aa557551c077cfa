"""Cross-prediction routing (Alg. 1) and its backward, equation by equation."""

import torch
from torch.nn import functional

from fastroute.backends._convolution import Convolution
from fastroute.backends.reference.mix import dense_like
from fastroute.ops._convolution import convolve
from fastroute.ops._library import differentiate
from fastroute.ops._paths import accumulate_dtype, channels_first, empty_map


def _unsqueeze_like(values, x):
    """Return values (N) or (N, C) with the dimensions that broadcast over x (N, C, *S)."""
    return values.reshape(*values.shape, *[1] * (x.dim() - values.dim()))


def _prediction(x, weight, bias, geometry):
    """Compute U_ij in x's dtype (Eq. 3.1)."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    dtype = accumulate_dtype(x.dtype)
    if x.dim() == 2:
        return functional.linear(x, weight, bias).to(dtype)
    return convolve(x, weight, bias, *geometry).to(dtype)


def _sums(xs, weight, bias, gates, geometry):
    """Compute Σ_i g_ij U_ij for every j."""
    m, n = weight.shape[:2]
    gates = gates.to(accumulate_dtype(xs[0].dtype))
    sums = []
    for j in range(n):
        us = [_prediction(xs[i], weight[i, j], None if bias is None else bias[i, j], geometry) for i in range(m)]
        sums.append(sum(_unsqueeze_like(gates[:, i, j], u) * u for i, u in enumerate(us)))
    return sums


def _sums_of_gated(xs, weight, bias, gates, geometry):
    """Compute the same with one prediction for each j, from the concatenated gated inputs."""
    n, dtype = weight.shape[1], accumulate_dtype(xs[0].dtype)
    gates = gates.to(dtype)
    sums = []
    for j in range(n):
        gated = torch.cat([_unsqueeze_like(gates[:, i, j], x) * x.to(dtype) for i, x in enumerate(xs)], dim=1)
        total = _prediction(gated.to(xs[0].dtype), torch.cat(weight[:, j].unbind(), dim=1), None, geometry)
        if bias is not None:
            total = total + _unsqueeze_like((gates[:, :, j, None] * bias[:, j].to(dtype)).sum(1), total)
        sums.append(total)
    return sums


def cross_predict(xs, weight, bias, gates, stride, padding, dilation, relu, form):
    sums = (_sums if form == "predict" else _sums_of_gated)(xs, weight, bias, gates, (stride, padding, dilation))
    outputs = [torch.relu(y) for y in sums] if relu else sums  # Eq. 3.6
    return [dense_like(y, empty_map(xs[0], y.shape)) for y in outputs]


def cross_predict_backward(grad_outputs, outputs, xs, weight, bias, gates, stride, padding, dilation, grad_inputs):
    x, (m, n) = xs[0], weight.shape[:2]
    dtype, geometry = accumulate_dtype(x.dtype), (stride, padding, dilation)
    convolution = Convolution(*geometry, not channels_first(x))
    gates = gates.to(dtype)
    grads = [grad.to(dtype) for grad in grad_outputs]
    if outputs:
        grads = [torch.where(y <= 0, 0, grad) for grad, y in zip(grads, outputs, strict=True)]
    grad_weight, grad_gates = gates.new_zeros(weight.shape), torch.zeros_like(gates)
    grad_bias = gates.new_zeros(0 if bias is None else bias.shape)
    grad_xs = [torch.zeros_like(x, dtype=dtype) for x in xs]
    for i in range(m):
        for j in range(n):
            w = weight[i, j].to(x.dtype)
            u = _prediction(xs[i], w, None if bias is None else bias[i, j], geometry)
            grad_gates[:, i, j] = (grads[j] * u).flatten(1).sum(1)
            grad_u = _unsqueeze_like(gates[:, i, j], u) * grads[j]
            if bias is not None:
                grad_bias[i, j] = grad_u.transpose(0, 1).flatten(1).sum(1)
            if len(x):
                grad_u = convolution.arrange(grad_u.to(x.dtype))
                grad_weight[i, j] = convolution.weight_gradient(grad_u, xs[i], w)
                if grad_inputs:
                    grad_xs[i] += convolution.input_gradient(grad_u, xs[i], w)
    return [dense_like(grad, x) for grad in grad_xs] if grad_inputs else [], grad_weight, grad_bias, grad_gates


def _setup(ctx, inputs, output):
    grad_outputs, outputs, xs, weight, bias, gates, *geometry, _ = inputs
    ctx.m, ctx.n, ctx.geometry = len(xs), len(grad_outputs), geometry
    ctx.save_for_backward(weight, bias, gates, *grad_outputs, *xs, *outputs)


def _second_order(ctx, grad_xs, grad_weight, grad_bias, grad_gates):
    """Return the derivative of the backward: recompute the forward in plain PyTorch and differentiate it twice.

    The backward uses the outputs only as a mask, through which no derivative flows.
    """
    dtype = accumulate_dtype(ctx.saved_tensors[3].dtype)
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in ctx.saved_tensors]
    parameters, paths = leaves[:3], leaves[3:]
    grad_outputs, xs, outputs = paths[: ctx.n], paths[ctx.n : ctx.n + ctx.m], paths[ctx.n + ctx.m :]
    with torch.enable_grad():
        sums = _sums(xs, *parameters, ctx.geometry)
        if outputs:
            sums = [torch.where(y <= 0, 0, total) for total, y in zip(sums, outputs, strict=True)]
        objective = sum((total * grad).sum() for total, grad in zip(sums, grad_outputs, strict=True))
        wanted = [(x, g) for x, g in zip(xs, grad_xs or [None] * ctx.m, strict=True) if g is not None]
        grads = (grad_weight, grad_bias, grad_gates)
        wanted += [(p, g) for p, g in zip(parameters, grads, strict=True) if p is not None and g is not None]
        first = torch.autograd.grad(objective, [t for t, _ in wanted], create_graph=True)
        objective = sum((f * g).sum() for f, (_, g) in zip(first, wanted, strict=True))
    present = [t for t in leaves[: 3 + ctx.n + ctx.m] if t is not None]
    second = iter(torch.autograd.grad(objective, present, allow_unused=True))
    d = [None if t is None else next(second) for t in leaves[: 3 + ctx.n + ctx.m]]
    geometry = [None if values else [] for values in ctx.geometry]  # PyTorch takes an empty list for one of tensors
    return d[3 : 3 + ctx.n], [None] * len(outputs), d[3 + ctx.n :], *d[:3], *geometry, None


differentiate("cross_predict_backward", _second_order, _setup)
