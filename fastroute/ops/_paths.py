"""Checks and memory formats of lists of parallel paths, shared by all operators."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import torch
from torch import Tensor

from fastroute._defaults import MAX_PATHS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums, gates and scores for inputs of `dtype`: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _sample_is_dense(x: Tensor, order: Sequence[int]) -> bool:
    expected = 1
    sizes, strides = x.shape, x.stride()
    for dim in order:
        if sizes[dim] != 1:
            if strides[dim] != expected:
                return False
            expected *= sizes[dim]
    return True


def channels_first(x: Tensor) -> bool:
    """Return whether each sample of x (N, C, *S) is dense in memory as [C, *S]; any batch stride is allowed."""
    return _sample_is_dense(x, range(x.dim() - 1, 0, -1))


def channels_last(x: Tensor) -> bool:
    """Return whether each sample of x (N, C, *S) is dense in memory as [*S, C]; any batch stride is allowed."""
    return _sample_is_dense(x, (1, *range(x.dim() - 1, 1, -1)))


def empty_path(x: Tensor) -> Tensor:
    """Return an uninitialised tensor of x's shape and sample layout, with a dense batch dimension.

    The strides of x are kept even along dimensions of size 1: later layers read the memory format from them.
    """
    return x.new_empty_strided(x.shape, (math.prod(x.shape[1:]), *x.stride()[1:]))


def empty_map(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an uninitialised tensor (N, C', *S') of x's dtype and memory format; [C', *S'] if x fits both formats."""
    return x.new_empty_strided(shape, dense_strides(shape, channels_first(x)))


def dense_strides(shape: Sequence[int], channels_first: bool) -> list[int]:
    """Return the strides of a map (N, C, *S) that is dense in memory as [N, C, *S], or else as [N, *S, C]."""
    order = range(len(shape) - 1, 0, -1) if channels_first else (1, *range(len(shape) - 1, 1, -1))
    strides, expected = [0] * len(shape), 1
    for dim in (*order, 0):
        strides[dim] = expected
        expected *= shape[dim]
    return strides


def path_list(name: str, xs: Sequence[Tensor]) -> list[Tensor]:
    """Return xs as a list; raise TypeError unless it is a list or tuple of tensors."""
    if not isinstance(xs, (list, tuple)):
        raise TypeError(f"{name} is a {type(xs).__name__}; it must be a list of tensors, one for each path")
    for i, x in enumerate(xs):
        if not isinstance(x, Tensor):
            traced = type(x).__module__ == "torch.fx.proxy"
            hint = "; trace with the routing layer as a leaf module" if traced else ""
            raise TypeError(f"{name}[{i}] is a {type(x).__name__}; every path must be a tensor (N, C, *S){hint}")
    return list(xs)


def check_tensors(**tensors: Tensor) -> None:
    """Raise TypeError unless each of the named arguments is a tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            given = "None" if tensor is None else f"a {type(tensor).__name__}"
            raise TypeError(f"{name} is {given}; it must be a tensor")


def check_integers(**values: int) -> None:
    """Raise TypeError unless each of the named arguments is an integer."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} is {value!r}; it must be an integer")


def check_numbers(**values: float) -> None:
    """Raise TypeError unless each of the named arguments is a number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} is {value!r}; it must be a number")


def check_activation(activation: str | None) -> None:
    """Raise ValueError unless the activation is "relu" or None."""
    if activation not in ("relu", None):
        raise ValueError(f"activation is {activation!r}; it must be 'relu' or None")


def check_paths(name: str, xs: Sequence[Tensor]) -> None:
    """Raise unless xs are 1 to 8 floating-point tensors (N, C, *S) of one shape, dtype and device."""
    if not 1 <= len(xs) <= MAX_PATHS:
        raise ValueError(f"{name} has {len(xs)} paths; it must have 1 to {MAX_PATHS}")
    first = xs[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    if dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name}[0] has dtype {dtype}; it must be one of {names}")
    if not 2 <= len(shape) <= 5:
        raise ValueError(f"{name}[0] has shape {tuple(shape)}; it must be (N, C) with up to 3 spatial sizes more")
    if any(size == 0 for size in shape[1:]):
        raise ValueError(f"{name}[0] has shape {tuple(shape)}; only the batch size may be 0")
    for i, x in enumerate(xs):
        if x.layout != torch.strided:
            raise ValueError(f"{name}[{i}] has layout {x.layout}; it must be torch.strided")
        if x.shape != shape:
            raise ValueError(
                f"{name}[{i}] has shape {tuple(x.shape)}; it must have the shape of {name}[0], {tuple(shape)}"
            )
        if x.dtype != dtype:
            raise TypeError(f"{name}[{i}] has dtype {x.dtype}; it must have the dtype of {name}[0], {dtype}")
        if x.device != device:
            raise ValueError(f"{name}[{i}] is on {x.device}; it must be on the device of {name}[0], {device}")


def align_paths(name: str, xs: Sequence[Tensor]) -> list[Tensor]:
    """Return the paths in one sample layout, [C, *S] or [*S, C]; paths in any other layout are copied.

    Raises:
        ValueError: some paths are NCHW and others channels_last. A silent copy would cost more than the routing.
    """
    if all(x.is_contiguous() for x in xs):  # fast path without a loop over strides in Python
        return list(xs)
    firsts, lasts = [channels_first(x) for x in xs], [channels_last(x) for x in xs]
    if all(firsts) or all(lasts):
        return list(xs)
    only_first = next((i for i, f in enumerate(firsts) if f and not lasts[i]), None)
    only_last = next((i for i, f in enumerate(lasts) if f and not firsts[i]), None)
    if only_first is not None and only_last is not None:
        raise ValueError(
            f"{name}[{only_first}] is contiguous and {name}[{only_last}] is channels_last; "
            "every path must have the same memory format"
        )
    if only_last is not None:
        return [x if last else _to_channels_last(x) for x, last in zip(xs, lasts, strict=True)]
    return [x if first else x.contiguous() for x, first in zip(xs, firsts, strict=True)]


def align_like(xs: Sequence[Tensor], like: Tensor) -> list[Tensor]:
    """Return tensors, such as incoming gradients, in like's sample layout and dtype; copy only where they differ."""
    xs = [x if x.dtype == like.dtype else x.to(like.dtype) for x in xs]
    if channels_first(like):
        return [x if x.is_contiguous() or channels_first(x) else x.contiguous() for x in xs]
    return [x if channels_last(x) else _to_channels_last(x) for x in xs]


def align_saved(xs: Sequence[Tensor]) -> list[Tensor]:
    """Return the paths that a forward saved, in the sample layout of the first. A compiled graph may mix layouts."""
    first = align_paths("xs", xs[:1])[0]
    return [first, *align_like(xs[1:], first)]


def _to_channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def check_weight(name: str, weight: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Raise unless a parameter has this shape, x's device, and x's dtype or float32."""
    if weight.shape != shape:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; it must have shape {shape}")
    if weight.device != x.device:
        raise ValueError(f"{name} is on {weight.device}; it must be on the device of the paths, {x.device}")
    if weight.dtype != torch.float32 and weight.dtype != x.dtype:
        allowed = " or ".join(dict.fromkeys((str(x.dtype), "torch.float32")))
        raise TypeError(f"{name} has dtype {weight.dtype}; it must be {allowed} for paths of {x.dtype}")


def check_gate(xs: Sequence[Tensor], w1, b1, w2, b2) -> None:
    """Raise unless w1, b1, w2 and b2 are gate parameters for the paths, as `cross_connect` takes them."""
    x, m, channels = xs[0], len(xs), xs[0].shape[1]
    if w2.dim() != 3 or not 1 <= w2.shape[1] <= MAX_PATHS:
        raise ValueError(
            f"w2 has shape {tuple(w2.shape)}; it must be (m, n, G), from m = {m} paths to n = 1 to {MAX_PATHS}"
        )
    if w1 is None:
        if b1 is not None:
            raise ValueError("b1 is given without w1; the linear gate (w1=None) has the bias b2 alone")
        hidden = channels
    else:
        if w1.dim() != 3 or w1.shape[1] == 0:
            raise ValueError(f"w1 has shape {tuple(w1.shape)}; it must be (m, G, C) = ({m}, G, {channels})")
        hidden = w1.shape[1]
        check_weight("w1", w1, (m, hidden, channels), x)
        if b1 is not None:
            check_weight("b1", b1, (m, hidden), x)
    check_weight("w2", w2, (m, w2.shape[1], hidden), x)
    if b2 is not None:
        check_weight("b2", b2, (m, w2.shape[1]), x)
