"""Who computes an operator: the backends, what each can serve, and the ordered choice between them."""

from fastroute.backends import _decompositions  # noqa: F401 (registers them)
from fastroute.backends._choice import BACKENDS, ORDER, Backend, use_backend

__all__ = ["BACKENDS", "ORDER", "Backend", "use_backend"]
