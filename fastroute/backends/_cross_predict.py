"""Cross-prediction (Alg. 1) from PyTorch's convolutions and Triton kernels between them.

csrc/ops/predictions.cpp does the same with the compiled kernels.

The backward is the same for both forms of the forward. With dP_j the gradient before the ReLU:

    T_ij = W_ijᵀ dP_j, for all i at once
    dg_ij = <T_ij, X_i> + <b_ij, Σ dP_j>, since <dP_j, W_ij X_i> = <W_ijᵀ dP_j, X_i>
    dX_i = Σ_j g_ij T_ij
    dW_ij, from X_i and g_ij dP_j
    db_ij = Σ_s g_ij Σ dP_j

so that the m·n predictions need not be saved in the forward.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from fastroute.backends._convolution import Convolution
from fastroute.ops._paths import accumulate_dtype, channels_first, dense_strides, empty_map, empty_path
from fastroute.ops.cross_predict import output_shape


@dataclass(frozen=True)
class Passes:
    """Cross-prediction with a backend's elementwise kernels.

    A joined tensor holds several paths concatenated along its channels. The module `kernels` has

        sum_predictions(predictions, gates, offsets, relu, outputs)
            outputs_j = ReLU(Σ_i g_ij U_ij + offsets_j). predictions[i] joins U_ij over j.
        scale_paths(paths, masks, weights, sums, masked, scaled) -> totals
            masked_p = paths_p where masks_p > 0, else 0; without masks, masked_p = paths_p. scaled[q] joins
            w_pq masked_p over p. With `sums`, totals (N, P, C) are the sums of masked over space.
        sum_gradients(terms, xs, gates, grad_xs) -> products
            products_ij = <T_ij, X_i>, and grad_xs_i = Σ_j g_ij T_ij unless grad_xs is empty. terms[j] joins T_ij over
            i. xs have the memory format of the convolutions, grad_xs that of the paths.

    chunk_bytes: maximal bytes of a path per chunk of samples.
    """

    kernels: ModuleType
    chunk_bytes: int

    def _convolution(self, x: Tensor, geometry: tuple) -> Convolution:
        return Convolution(*geometry, not channels_first(x))

    def _empty(self, convolution: Convolution, x: Tensor, channels: int, count: int) -> list[Tensor]:
        """Return uninitialised tensors with x's samples and space, in the memory format of the convolutions."""
        shape = x.shape[0], channels, *x.shape[2:]
        strides = dense_strides(shape, channels_first=not convolution.channels_last)
        return [x.new_empty_strided(shape, strides) for _ in range(count)]

    def _arranged(self, convolution: Convolution, xs: list[Tensor]) -> list[Tensor]:
        """Return the paths in the memory format of the convolutions."""
        return [convolution.arrange(x) for x in xs]

    def _chunks(self, path: Tensor) -> list[slice]:
        """Return slices of equal numbers of samples."""
        count = max(1, -(-path.numel() * path.itemsize // self.chunk_bytes))
        size = max(1, -(-path.shape[0] // count))
        return [slice(first, first + size) for first in range(0, path.shape[0], size)]

    def forward(self, xs, weight, bias, gates, stride, padding, dilation, relu, form):
        x, n = xs[0], weight.shape[1]
        dtype = accumulate_dtype(x.dtype)
        convolution = self._convolution(x, (stride, padding, dilation))
        shape = output_shape(x, weight, stride, padding, dilation)
        outputs = [empty_map(x, shape) for _ in range(n)]
        weight, gates = weight.to(x.dtype), gates.to(dtype)
        compute, joined = (self._predict, _by_input) if form == "predict" else (self._gate, _by_output)
        weights = joined(convolution, weight)
        for chunk in self._chunks(max(x, outputs[0], key=Tensor.numel)):
            part, ys = [x[chunk] for x in xs], [y[chunk] for y in outputs]
            compute(convolution, part, weights, bias, gates[chunk], relu, ys)
        return outputs

    def _predict(self, convolution, xs, weights, bias, gates, relu, outputs):
        xs = self._arranged(convolution, xs)
        biases = [None] * len(xs) if bias is None else bias.to(xs[0].dtype).flatten(1)
        us = [convolution.forward(x, w, b) for x, w, b in zip(xs, weights, biases, strict=True)]
        self.kernels.sum_predictions(us, gates, None, relu, outputs)

    def _gate(self, convolution, xs, weights, bias, gates, relu, outputs):
        offsets = None if bias is None else (gates[..., None] * bias.to(gates.dtype)).sum(1)
        [gated] = self._empty(convolution, xs[0], len(xs) * xs[0].shape[1], 1)
        ones = gates.new_ones(gates.shape[0], 1, 1)
        for j, (w, y) in enumerate(zip(weights, outputs, strict=True)):
            self.kernels.scale_paths(xs, [], gates[:, :, j, None], False, [], [gated])
            prediction = convolution.forward(gated, w, None)
            offset = None if offsets is None else offsets[:, j : j + 1]
            self.kernels.sum_predictions([prediction], ones, offset, relu, [y])

    def backward(self, grad_outputs, outputs, xs, weight, bias, gates, stride, padding, dilation, grad_inputs):
        x, dtype = xs[0], accumulate_dtype(xs[0].dtype)
        convolution = self._convolution(x, (stride, padding, dilation))
        weight, gates = weight.to(x.dtype), gates.to(dtype)
        grad_xs = [empty_path(x) for x in xs] if grad_inputs else []
        m, n = weight.shape[:2]
        weights = _by_output(convolution, weight)
        grad_weight = _by_input(convolution, gates.new_zeros(weight.shape))
        products, totals = [gates.new_empty(0, m, n)], [gates.new_empty(0, n, weight.shape[2])]
        for chunk in self._chunks(max(x, grad_outputs[0], key=Tensor.numel)):
            part, g = self._arranged(convolution, [x[chunk] for x in xs]), gates[chunk]
            dys, ys = [dy[chunk] for dy in grad_outputs], [y[chunk] for y in outputs]
            grads, total = self._grads_of_sums(convolution, dys, ys, g, bias is not None)
            if bias is not None:
                totals.append(total)
            self._grad_weight(convolution, grads, part, weight, g, grad_weight)
            products.append(self._grad_inputs(convolution, grads, part, weights, g, [dx[chunk] for dx in grad_xs]))
        grad_weight = torch.stack(grad_weight).view_as(weight).contiguous()
        grad_gates, totals = torch.cat(products), torch.cat(totals)
        if bias is None:
            return grad_xs, grad_weight, gates.new_empty(0), grad_gates
        grad_gates += (totals[:, None] * bias.to(dtype)).sum(-1)
        return grad_xs, grad_weight, (gates[..., None] * totals[:, None]).sum(0), grad_gates

    def _grads_of_sums(self, convolution, grad_outputs, outputs, gates, sums):
        """Return dP_j in the memory format of the convolutions and, with `sums`, their sums over space."""
        if not outputs and not sums:  # dY_j itself
            return self._arranged(convolution, grad_outputs), None
        grad = grad_outputs[0]
        grads = self._empty(convolution, grad, grad.shape[1], len(grad_outputs))
        none = gates.new_empty(gates.shape[0], len(grads), 0)
        return grads, self.kernels.scale_paths(grad_outputs, outputs, none, sums, grads, [])

    def _grad_weight(self, convolution, grads, xs, weight, gates, grad_weight):
        """Add to dW, input by input, so that only n of the m·n terms g_ij dP_j exist at a time."""
        n, width = weight.shape[1:3]
        [scaled] = self._empty(convolution, grads[0], n * width, 1)
        for i, x in enumerate(xs):
            self.kernels.scale_paths(grads, [], gates[:, i, :, None], False, [], [scaled])
            grad_weight[i] += convolution.weight_gradient(scaled, x, weight[i].flatten(0, 1))

    def _grad_inputs(self, convolution, grads, xs, weights, gates, grad_xs):
        """Return the inner products <T_ij, X_i>, and write dX unless grad_xs is empty."""
        [like] = self._empty(convolution, xs[0], weights[0].shape[1], 1)
        terms = [convolution.input_gradient(grad, like, w) for grad, w in zip(grads, weights, strict=True)]
        return self.kernels.sum_gradients(terms, xs, gates, grad_xs)


def _by_input(convolution: Convolution, weight: Tensor) -> list[Tensor]:
    """Return for each i the W_ij of all j (n·C_out, C_in, *k), in the memory format of the convolutions."""
    return [convolution.arrange(w.flatten(0, 1)) for w in weight]


def _by_output(convolution: Convolution, weight: Tensor) -> list[Tensor]:
    """Return for each j the W_ij of all i (C_out, m·C_in, *k), in the memory format of the convolutions."""
    return [convolution.arrange(w.transpose(0, 1).flatten(1, 2)) for w in weight.unbind(1)]
