"""Modules: the routing layers, and the containers that hold parallel paths."""

from fastroute.nn.cross_connection import CrossConnection, Routing
from fastroute.nn.cross_stitch import CrossStitch
from fastroute.nn.multipath import MultiPathNetwork, ParallelPaths
from fastroute.nn.sparse import SparseRouter, SparseRouting

__all__ = [
    "CrossConnection",
    "CrossStitch",
    "MultiPathNetwork",
    "ParallelPaths",
    "Routing",
    "SparseRouter",
    "SparseRouting",
]
