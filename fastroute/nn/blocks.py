"""The end of a convolution's block in one kernel: batch normalisation, the addition of a shortcut, and a ReLU."""

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from fastroute.backends import native_serves_cpu
from fastroute.ops import _batch_norm
from fastroute.ops._compile_form import is_exporting, keeps_cpu_kernels
from fastroute.ops._library import under_transform
from fastroute.ops._paths import DTYPES

# Bytes of a channel of one sample from which the kernel is faster than PyTorch's layers in the contiguous format. In
# channels_last it has no such bound.
LEAST_CHANNEL_BYTES = 128

# A patched forward of the class is called.
FORWARD = nn.BatchNorm2d.forward


class FusedSequential(nn.Sequential):
    """A sequence of layers that computes each batch normalisation in one kernel with the ReLU behind it.

    Outputs, gradients, running statistics and names in the state dict are those of `torch.nn.Sequential`. `block_end`
    says which layers are fused.

    Example:
        >>> layers = FusedSequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> layers(torch.randn(4, 3, 16, 16)).shape
        torch.Size([4, 8, 14, 14])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the last layer for x, (N, C, H, W) where layers are to be fused."""
        return _in_order(self, x) if _may_fuse(x) else super().forward(x)


SEQUENTIAL = (nn.Sequential.forward, FusedSequential.forward)
"""Forwards that compute a module's children one after the other."""


def residual_sum(residual: nn.Sequential, x: Tensor, shortcut: nn.Module, end: nn.Module) -> Tensor:
    """Return end(residual(x) + shortcut(x)), computed as by `block_end` where the residual ends in a normalisation.

    Args:
        residual: the layers of the residual.
        x: (N, C, H, W).
        shortcut: called with x after the residual's layers; returns the shape of the residual.
        end: an activation.

    Returns:
        (N, C', H', W').
    """
    if _may_fuse(x) and type(residual).forward in SEQUENTIAL and not _is_observed(residual):
        return _in_order(residual, x, lambda: shortcut(x), end)
    return end(residual(x) + shortcut(x))


def block_end(norm: nn.Module, x: Tensor, shortcut: Tensor | None = None, end: nn.Module | None = None) -> Tensor:
    """Return end(norm(x) + shortcut), with outputs, gradients and running statistics as the modules compute them.

    On a CPU, one kernel reads x for the statistics, and once more for all the rest; the backward reads the maps twice
    as well. It takes `torch.nn.BatchNorm2d`, a shortcut of x's shape and layout, and `torch.nn.ReLU`. x is in
    channels_last, or contiguous with 128 bytes or more of each channel in a sample. In a graph of `torch.compile`,
    where the layout does not matter, it is one node in training, and in evaluation for half-precision maps, unless
    `fastroute.compile_form("fused")` leaves the layers to the compiler. Everything else is computed by the
    modules themselves, one after the other: other devices and modules, modules with hooks, graphs that are traced or
    exported, torch.func's transforms, and whatever runs under another backend than the compiled kernels.

    Args:
        norm: the normalisation.
        x: (N, C, H, W).
        shortcut: of norm(x)'s shape; None adds nothing.
        end: an activation; None applies none.

    Returns:
        (N, C, H, W), in x's dtype and memory format.
    """
    if _may_fuse(x) and _serves(norm, x, shortcut, end):
        return _fused(norm, x, shortcut, type(end) is nn.ReLU)
    y = norm(x)
    y = y if shortcut is None else y + shortcut
    return y if end is None else end(y)


def _in_order(
    layers: Iterable[nn.Module],
    x: Tensor,
    shortcut: Callable[[], Tensor] | None = None,
    end: nn.Module | None = None,
) -> Tensor:
    """Return end(the layers' output + shortcut()), or without these the layers' output."""
    remaining = list(layers)
    while remaining:
        layer = remaining.pop(0)
        if type(layer) is not nn.BatchNorm2d:
            x = layer(x)
        elif remaining:
            relu = remaining.pop(0) if type(remaining[0]) is nn.ReLU else None
            x = block_end(layer, x, None, relu)
        elif shortcut is None:
            return block_end(layer, x)
        elif _may_fuse(x):
            return block_end(layer, x, shortcut(), end)
        else:
            x = layer(x)
    return x if shortcut is None else end(x + shortcut())


def _fused(norm: nn.BatchNorm2d, x: Tensor, shortcut: Tensor | None, relu: bool) -> Tensor:
    of_batch = norm.training or norm.running_mean is None
    mean, variance = (None, None) if of_batch else (norm.running_mean, norm.running_var)
    y, mean, variance = _batch_norm.batch_norm(x, shortcut, norm.weight, norm.bias, mean, variance, norm.eps, relu)
    if norm.training and norm.track_running_stats:
        _update(norm, x.numel() // x.shape[1], mean, variance)
    return y


@torch.no_grad()
def _update(norm: nn.BatchNorm2d, count: int, mean: Tensor, variance: Tensor) -> None:
    """Update the running statistics, that of the variance with the unbiased one of `count` values."""
    momentum = norm.momentum or 0.0
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1 / float(norm.num_batches_tracked)
    if norm.running_mean is None:
        return
    with _same_versions(norm.running_mean, norm.running_var):
        norm.running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        norm.running_var.mul_(1 - momentum).add_(variance, alpha=momentum * count / (count - 1))


def _same_versions(*tensors: Tensor):
    """Return a context in which tensors change without new version numbers, as in PyTorch's own kernel.

    The backward holds the tensors without reading them; with new version numbers, it would raise after a later call.
    """
    if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):  # these have no versions
        return contextlib.nullcontext()
    return torch.autograd._unsafe_preserve_version_counter(tensors)


def _may_fuse(x: Tensor) -> bool:
    """Return whether a kernel may replace modules for such an input: a plain CPU tensor, without tracers or modes."""
    if type(x) is not Tensor or x.device.type != "cpu" or under_transform():
        return False
    if torch.compiler.is_compiling():
        return not is_exporting() and keeps_cpu_kernels()
    return (
        native_serves_cpu()
        and not torch.jit.is_tracing()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._len_torch_function_stack()
        and not _has_any_global_hook()
        and nn.BatchNorm2d.forward is FORWARD
    )


def _serves(norm: nn.Module, x: Tensor, shortcut: Tensor | None, end: nn.Module | None) -> bool:
    """Return whether the kernel computes what these modules compute, and is faster."""
    if type(norm) is not nn.BatchNorm2d or _is_observed(norm):
        return False
    if end is not None and (type(end) not in (nn.ReLU, nn.Identity) or _is_observed(end)):
        return False
    if x.layout != torch.strided or x.dim() != 4 or x.dtype not in DTYPES:
        return False
    if x.shape[1] != norm.num_features or x.numel() <= x.shape[1]:
        return False
    parameters = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    given = [p for p in parameters if p is not None]
    if not all(type(p) in (Tensor, nn.Parameter) and p.device == x.device for p in given):
        return False
    dtypes = {p.dtype for p in given}  # PyTorch refuses others
    if dtypes not in ([set(), {x.dtype}] if x.dtype == torch.float64 else [set(), {x.dtype}, {torch.float32}]):
        return False
    if (norm.running_mean is None) != (norm.running_var is None) or norm.eps <= 0:  # PyTorch refuses these
        return False
    if shortcut is not None and not (
        type(shortcut) is Tensor
        and shortcut.shape == x.shape
        and shortcut.dtype == x.dtype
        and shortcut.device == x.device
        and shortcut.stride() == x.stride()
    ):
        return False
    return _is_faster(norm, x)


def _is_faster(norm: nn.BatchNorm2d, x: Tensor) -> bool:
    """Return whether the kernel is faster than the modules, as steps of networks were measured to be."""
    if torch.compiler.is_compiling():  # Inductor normalises float32 in place in evaluation, which is as fast
        return norm.training or x.dtype in (torch.bfloat16, torch.float16)
    if x.is_contiguous(memory_format=torch.channels_last):
        return True
    return x.is_contiguous() and x.shape[2] * x.shape[3] * x.itemsize >= LEAST_CHANNEL_BYTES


def _is_observed(module: nn.Module) -> bool:
    """Return whether a hook, a forward of the instance or a compiled call may read or change the module's result."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )
