"""Modules: the routing layers, and the containers that hold parallel paths."""

from fastroute.nn.cross_connection import CrossConnection, Routing
from fastroute.nn.cross_stitch import CrossStitch
from fastroute.nn.multipath import MultiPathNetwork, ParallelPaths

__all__ = ["CrossConnection", "CrossStitch", "MultiPathNetwork", "ParallelPaths", "Routing"]
