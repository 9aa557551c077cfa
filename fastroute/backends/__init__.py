"""Backends that compute the operators, and the choice between them."""

from fastroute.backends import _decompositions  # noqa: F401 (registers the decompositions)
from fastroute.backends._choice import BACKENDS, ORDER, Backend, native_serves_cpu, use_backend

__all__ = ["BACKENDS", "ORDER", "Backend", "native_serves_cpu", "use_backend"]
