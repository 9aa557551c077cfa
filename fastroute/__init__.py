"""Data-dependent routing for multi-path neural networks, with fused kernels (Tissera, 2023)."""

from fastroute import backends, models, nn, ops
from fastroute._version import __version__
from fastroute.backends import use_backend
from fastroute.models import multipath
from fastroute.ops._compile_form import compile_form

__all__ = ["__version__", "backends", "compile_form", "models", "multipath", "nn", "ops", "use_backend"]
