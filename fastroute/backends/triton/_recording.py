"""Recordings of a call's kernel launches, which the compiled library replays without Python (csrc/triton).

A call can be recorded if it only allocates tensors, launches kernels on them and on its arguments, and returns the
allocated tensors. All other calls stay in Python.
"""

import struct
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}
# Operators that return their argument if no conversion is needed.
_CONVERSIONS = {_aten.contiguous.default, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.other}

_state = threading.local()

# Keeps the kernels of all recordings alive: the compiled library only has their addresses.
_kernels: set = set()


def launch(kernel, grid: tuple[int, ...]) -> Callable:
    """Return `kernel[grid]`; during a recording, its launch is recorded."""
    recorder = getattr(_state, "recorder", None)
    return kernel[grid] if recorder is None else recorder.launching(kernel, grid)


def record(function: Callable, args: tuple):
    """Return function(*args), and pass the recording to the compiled library if the call can be recorded."""
    recorder = _Recorder(args)
    _state.recorder = recorder
    try:
        with recorder:
            results = function(*args)
    finally:
        _state.recorder = None
    if code := recorder.code(results):
        _kernels.update(recorder.kernels)
        torch.ops.fastroute_native.record(code)
    return results


class _Recorder(TorchDispatchMode):
    def __init__(self, args: tuple):
        super().__init__()
        self.tensors = list(_tensors(args))  # the arguments first, then the allocations
        self.given = len(self.tensors)
        self.slots = {id(tensor): slot for slot, tensor in enumerate(self.tensors)}
        self.aliases: list[Tensor] = []  # kept alive, so that their ids are not reused
        self.launches: list[list[int]] = []
        self.kernels: list = []
        self.obstacle: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.slots[id(result)] = len(self.tensors)
            self.tensors.append(result)
        elif func is _aten.detach.default and id(args[0]) in self.slots:  # by `empty_like`
            self.slots[id(result)] = self.slots[id(args[0])]
            self.aliases.append(result)
        elif func not in _CONVERSIONS or result is not args[0]:
            self.obstacle = f"{func} is called in addition to kernels"
        return result

    def launching(self, kernel, grid):
        def run(*args, **settings):
            compiled = kernel[grid](*args, **settings)
            if compiled is None:
                self.obstacle = "the interpreter runs the kernels"
            if self.obstacle is None:
                self._record_launch(kernel, compiled, grid, args, settings)
            return compiled

        return run

    def _record_launch(self, kernel, compiled, grid, args, settings) -> None:
        metadata = compiled.metadata
        scratch = metadata.global_scratch_size or getattr(metadata, "profile_scratch_size", 0)
        if scratch or metadata.num_ctas != 1 or getattr(metadata, "launch_cooperative_grid", False):
            self.obstacle = f"{metadata.name} needs more than a plain launch"
            return
        bound = {**dict(zip(kernel.arg_names, args, strict=False)), **settings}
        pairs = [
            pair
            for name, kind in compiled.src.signature.items()
            if kind != "constexpr"
            for pair in _flatten(bound[name], kind)
        ]
        arguments = [self._argument(value, kind) for value, kind in pairs]
        sizes = (*grid, 1, 1)[:3]
        shape = [*sizes, 32 * metadata.num_warps, metadata.shared, int(getattr(metadata, "launch_pdl", False))]
        self.launches.append([compiled.function, *shape, *_counted(arguments)])
        self.kernels.append(compiled)

    def _argument(self, value, kind: str) -> list[int]:
        if not isinstance(value, Tensor):
            return [-1, _constant(value, kind)]
        if id(value) in self.slots:
            return [self.slots[id(value)], 0]
        self.obstacle = "a kernel is given a tensor that is neither an argument nor allocated in the call"
        return [-1, 0]

    def code(self, results) -> list[int] | None:
        """Return the recording as integers for csrc/triton/recordings.cpp, or None if the call cannot be recorded."""
        groups = results if isinstance(results, tuple) else (results,)
        groups = [list(group) if isinstance(group, (list, tuple)) else [group] for group in groups]
        if not self.obstacle and any(self.slots.get(id(t), 0) < self.given for group in groups for t in group):
            self.obstacle = "a result is not allocated in the call"
        if self.obstacle:
            return None
        allocations = [
            [_TYPES[t.dtype], *_counted([[size] for size in t.shape]), *_counted([[s] for s in t.stride()])]
            for t in self.tensors[self.given :]
        ]
        groups = [_counted([[self.slots[id(t)]] for t in group]) for group in groups]
        return [*_counted(allocations), *_counted(groups), *_counted(self.launches)]


# Values of c10::ScalarType.
_TYPES = {torch.float32: 6, torch.float64: 7, torch.float16: 5, torch.bfloat16: 15}


def _counted(items: list[list[int]]) -> list[int]:
    """Return the number of items, followed by all items flattened."""
    return [len(items), *(number for item in items for number in item)]


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _flatten(value, kind) -> Iterator[tuple[object, str]]:
    """Yield values with their types in the kernel's signature; flatten tuples, skip compile-time constants."""
    if isinstance(kind, tuple):
        for item, of in zip(value, kind, strict=True):
            yield from _flatten(item, of)
    elif kind != "constexpr":
        yield value, kind


def _constant(value, kind: str) -> int:
    """Return the bits of a scalar argument in the low bytes of a 64-bit integer."""
    if kind in ("fp32", "f32"):
        return struct.unpack("<i", struct.pack("<f", value))[0]
    if kind == "fp64":
        return struct.unpack("<q", struct.pack("<d", value))[0]
    return int(value)
