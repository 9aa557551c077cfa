"""Modules: the routing layers, and the containers that hold parallel paths."""

from fastroute.nn.cross_connection import CrossConnection, Routing
from fastroute.nn.mixture_em import ConsistencyLoss, MixtureEMLoss, RelevanceNorm
from fastroute.nn.multipath import MultiPathNetwork, ParallelPaths

__all__ = [
    "ConsistencyLoss",
    "CrossConnection",
    "MixtureEMLoss",
    "MultiPathNetwork",
    "ParallelPaths",
    "RelevanceNorm",
    "Routing",
]
