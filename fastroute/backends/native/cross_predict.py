"""Cross-prediction (Alg. 1) with the compiled passes between PyTorch's convolutions."""

import torch

from fastroute.backends._cross_predict import Passes


def _passes(x: torch.Tensor) -> Passes:
    """On a CPU PyTorch's convolutions are fastest in channels_last, whose cost their other formats have inside.

    One by one, each result is used while it is in the caches, and its memory by the next one: in float32 that took 15 %
    off 3 paths of 16 channels to 3, and working on so few samples that paths stay in L3 took 4 % off. In bfloat16
    joined convolutions are faster by as much as that is worth. In float16 PyTorch's convolutions are 20 times slower
    than in float32, and add their inputs' gradients in float16.
    """
    if x.device.type == "cpu":
        pairwise = x.dtype == torch.float32
        return Passes(
            torch.ops.fastroute_native,
            channels_last=True,
            chunk_bytes=(3 if pairwise else 8) << 20,
            pairwise=pairwise,
            compute_dtype=torch.float32 if x.dtype == torch.float16 else None,
            new_empty_strided=torch.ops.fastroute_native.new_empty_strided,
        )
    return Passes(torch.ops.fastroute_native, channels_last=False, chunk_bytes=64 << 20, pairwise=False)


def cross_predict(xs, *rest):
    return _passes(xs[0]).forward(xs, *rest)


def cross_predict_backward(grad_outputs, outputs, xs, *rest):
    return _passes(xs[0]).backward(grad_outputs, outputs, xs, *rest)
