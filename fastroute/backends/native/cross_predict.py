"""Cross-prediction (Alg. 1) with the compiled passes between PyTorch's convolutions."""

import torch

from fastroute.backends._cross_predict import Passes


def _passes(x: torch.Tensor, weight: torch.Tensor) -> Passes:
    """On a CPU PyTorch's convolutions are fastest in channels_last, whose cost their other formats have inside.

    Working on few samples at a time leaves in the caches what one convolution or pass writes for the next, but converts
    the weight into the convolutions' own format each time. In float16 convolutions are 20 times slower than in float32,
    and add their inputs' gradients in float16.
    """
    if x.device.type == "cpu":
        return Passes(
            torch.ops.fastroute_native,
            channels_last=True,
            chunk_bytes=min(max(1 << 20, weight.nbytes), 8 << 20),
            chunk_samples=torch.get_num_threads(),
            compute_dtype=torch.float32 if x.dtype == torch.float16 else None,
            new_empty_strided=torch.ops.fastroute_native.new_empty_strided,
        )
    return Passes(torch.ops.fastroute_native, channels_last=False, chunk_bytes=64 << 20)


def cross_predict(xs, weight, *rest):
    return _passes(xs[0], weight).forward(xs, weight, *rest)


def cross_predict_backward(grad_outputs, outputs, xs, weight, *rest):
    return _passes(xs[0], weight).backward(grad_outputs, outputs, xs, weight, *rest)
