import contextlib
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from fastroute._scoped import Scoped
from fastroute.backends import native, reference, triton
from fastroute.ops import _compile_form
from fastroute.ops._library import KERNELS, NOT_COMPILED, OPERATORS, PYTHON, implement, without_autocast


@dataclass(frozen=True)
class Backend:
    """A backend of the operators.

    name: "triton", "native" or "reference".
    reason_against: called with device and dtype; returns None if the backend supports such tensors, else the reason.
    kernels: returns the module with one function per operator, of the operator's name.
    """

    name: str
    reason_against: Callable[[torch.device, torch.dtype], str | None]
    kernels: Callable[[], ModuleType]


def _backend(package: ModuleType) -> Backend:
    name = package.__name__.rpartition(".")[2]
    return Backend(name, package.reason_against, cache(lambda: import_module(f"{package.__name__}.kernels")))


BACKENDS = {backend.name: backend for backend in map(_backend, (triton, native, reference))}

# Device type -> backends, the fastest first; other devices only have the reference. On CUDA, csrc/ops/problem_sizes.h
# defines the problem sizes for which the native kernels are preferred to Triton.
ORDER = {"cuda": ("triton", "native", "reference"), "cpu": ("native", "reference")}

_override: str | None = None


def _lookup(name: str) -> Backend:
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; it must be one of {', '.join(map(repr, BACKENDS))}")
    return BACKENDS[name]


class use_backend(Scoped, contextlib.ContextDecorator):
    """Compute all operators with one backend, from here on, or inside a `with` block or a decorated function.

    The setting applies to the whole process, including autograd's threads, and takes precedence over the environment
    variable FASTROUTE_BACKEND. The backend is chosen at each call, also in code compiled by `torch.compile`, unless
    it was compiled in the fused form (see `compile_form`), which holds no operators. Set the variable before the
    import: later changes do not reach the choice of that form.

    Args:
        name: "triton", "native" or "reference"; None lets the library choose.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: raised by the first operator whose tensors the backend does not support.

    Example:
        >>> from fastroute.ops import mix
        >>> with use_backend("reference"):
        ...     ys = mix([torch.ones(4, 8), torch.ones(4, 8)], torch.eye(2))
        >>> len(ys)
        2
    """

    def __init__(self, name: str | None):
        super().__init__(None if name is None else _lookup(name).name)

    def __call__(self, function):
        self._set(self._before)
        return super().__call__(function)

    def _recreate_cm(self) -> "use_backend":
        return use_backend(self._value)  # remembers the backend of this call

    def _get(self) -> str | None:
        return _override

    def _set(self, value: str | None) -> None:
        _set_override(value)


def _set_override(backend: str | None) -> None:
    global _override
    _override = backend
    _tell_compile_form()
    if not NOT_COMPILED:
        torch.ops.fastroute_native.name_backend(backend or "")


def _named() -> str | None:
    """Return the backend that the user names, by `use_backend` or the environment; None for none."""
    return _override or os.environ.get("FASTROUTE_BACKEND")


@cache
def _choose(override: str | None, device: torch.device, dtype: torch.dtype) -> Backend:
    if override:
        backend = _lookup(override)
        if reason := backend.reason_against(device, dtype):
            raise RuntimeError(f"backend {override!r} cannot serve {dtype} tensors on {device}: {reason}")
        return backend
    reasons = {}
    for name in ORDER.get(device.type, ("reference",)):
        reasons[name] = BACKENDS[name].reason_against(device, dtype)
        if reasons[name] is None:
            if name == "reference" and len(reasons) > 1:
                why = "; ".join(f"{other}: {reason}" for other, reason in reasons.items() if reason)
                warnings.warn(
                    f"fastroute computes {dtype} on {device.type} in plain PyTorch, which is slower ({why})",
                    stacklevel=2,
                )
            return BACKENDS[name]
    raise AssertionError("the reference serves every device and dtype")


_CPU = torch.device("cpu")


def native_serves_cpu() -> bool:
    """Return whether the compiled kernels compute the operators on a CPU."""
    return (_named() or "native") == "native" and native.reason_against(_CPU, torch.float32) is None


def _tell_compile_form() -> None:
    """Tell what is traced for `torch.compile`, which cannot ask the environment."""
    _compile_form._backend_named = bool(_named())
    _compile_form._cpu_kernels = native_serves_cpu()


# Flags of the backends that can serve a tensor, for the compiled library. With none, it calls the Python operator.
_NATIVE, _TRITON, _CLUSTERS = 1, 2, 4


def _serving_flags(like: Tensor) -> int:
    """Return the flags of the backends that support a tensor; the compiled library chooses among them by size."""
    device, dtype = like.device, like.dtype
    override = _named()
    chosen = _choose(override, device, dtype).name
    if device.type != "cuda":
        return {"native": _NATIVE, "triton": _TRITON}.get(chosen, 0)
    serving = [chosen] if override else [n for n in ORDER["cuda"] if BACKENDS[n].reason_against(device, dtype) is None]
    clusters = "native" in serving and native.has_clusters(device)
    return _NATIVE * ("native" in serving) + _TRITON * ("triton" in serving) + _CLUSTERS * clusters


def _serve(name: str, prepare: Callable) -> Callable:
    def kernel(*args):
        args = prepare(*args)
        x = next((arg[0] for arg in args if isinstance(arg, list)), args[0])
        backend = _choose(_named(), x.device, x.dtype)
        function = getattr(backend.kernels(), name)
        with without_autocast(x.device.type):
            if backend.name == "triton" and not NOT_COMPILED and torch.ops.fastroute_native.recording_is_offered():
                return backend.kernels().record(function, args)
            return function(*args)

    return kernel


for _operator, _prepare in OPERATORS.items():
    KERNELS[_operator] = _serve(_operator, _prepare)
    implement(_operator, KERNELS[_operator], "CompositeExplicitAutograd")
_tell_compile_form()
if not NOT_COMPILED:
    PYTHON.impl("choose", _serving_flags, "CompositeExplicitAutograd")
