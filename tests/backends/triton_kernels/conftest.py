"""The Triton kernels against float64: in the interpreter where there is no card, on the card with `-m gpu`."""

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

from fastroute.backends import _choice
from fastroute.ops._library import NOT_COMPILED
from tests.backends.triton_kernels.devices import CUDA, on_card, on_host


@pytest.fixture(params=[pytest.param("cpu", marks=on_host), pytest.param("cuda", marks=on_card)])
def device(request):
    return request.param


REPLACED = set()  # modules of device functions that call the interpreter's triton.language


@contextlib.contextmanager
def without_recordings(monkeypatch):
    """Let Python launch every call, and forget afterwards which calls cannot be recorded."""
    monkeypatch.setattr(_choice.BACKENDS["triton"].kernels(), "record", lambda function, args: function(*args))
    forget = (lambda: None) if NOT_COMPILED else torch.ops.fastroute_native.forget_recordings
    forget()
    yield
    forget()


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Without a card, serve CPU tensors, and round and add as compiled code does.

    The interpreter by itself cuts off the bits that bfloat16 lacks, which doubles the error, and where an axis is not
    the last it adds one value after the other; compiled code has a sum in every thread, and adds those as a tree.

    On a card, have Python launch every call: tests look at launches and change what is planned. test_recordings.py is
    about those of the compiled library.
    """
    if CUDA:
        with without_recordings(monkeypatch):
            yield
        return
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps, TensorHandle

    def call_device_function(self, *args, **kwargs):
        """Replace the functions of triton.language once for a module: Triton does at each call, most of the time."""
        if id(self.fn.__globals__) not in REPLACED:
            interpreter._patch_lang(self.fn)
            REPLACED.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "__call__", call_device_function)

    def pairwise_sum(self, input):
        values = input.handle.data
        rows = values.reshape(-1) if self.axis is None else values.swapaxes(self.axis, -1).copy(order="C")
        total = rows.sum(-1, keepdims=True)
        total = total if self.axis is None else total.swapaxes(self.axis, -1)
        return self.to_tensor(total if self.keep_dims else total.squeeze(self.axis), input.dtype)

    monkeypatch.setattr(ReduceOps, "sum", pairwise_sum)
    cast = InterpreterBuilder.cast_impl

    def rounding_cast(self, src, dst_type):
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        rounded = np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded)
        return TensorHandle(rounded.reshape(src.data.shape), tl.bfloat16)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounding_cast)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    _choice._choose.cache_clear()
    yield
    _choice._choose.cache_clear()


@pytest.fixture
def poison(monkeypatch):
    """Fill what is allocated with NaN, so that elements that are not written are noticed."""

    def poisoned(allocate):
        def wrapped(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapped

    own = ((torch.Tensor, name) for name in ("new_empty", "new_empty_strided"))
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), *own):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@dataclasses.dataclass
class Launch:
    kernel: str
    grid: tuple[int, ...]
    args: tuple
    settings: dict


@pytest.fixture
def launches(monkeypatch):
    """The launches so far."""
    from tests.backends.triton_kernels.cases import cc, cp, em, gt, mx

    seen = []

    class Spy:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **settings):
                seen.append(Launch(self.kernel.fn.__name__, grid, args, settings))
                return self.kernel[grid](*args, **settings)

            return launch

    for module in (cc, mx, em, cp, gt):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Spy(getattr(module, name)))
    return seen
