"""Data-dependent routing for multi-path neural networks, with fused kernels (Tissera, 2023)."""

from fastroute import backends, models, nn, ops
from fastroute._version import __version__
from fastroute.backends import use_backend
from fastroute.inference import load
from fastroute.models import multipath

__all__ = ["__version__", "backends", "load", "models", "multipath", "nn", "ops", "use_backend"]
