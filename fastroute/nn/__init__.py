"""Modules: routing layers, containers for parallel paths, and clustering losses."""

from fastroute import backends  # noqa: F401 (registers the kernels)
from fastroute.nn.blocks import FusedSequential, block_end, residual_sum
from fastroute.nn.containers import MultiPathNetwork, ParallelPaths
from fastroute.nn.cross_connection import CrossConnection
from fastroute.nn.cross_prediction import CrossPrediction2d, CrossPredictionLinear
from fastroute.nn.cross_stitch import CrossStitch
from fastroute.nn.exact_convolutions import exact_convolutions
from fastroute.nn.gate_clustering import GateClusteringLoss
from fastroute.nn.gate_norm import GateNorm
from fastroute.nn.mixture_em import ConsistencyLoss, MixtureEMLoss, RelevanceNorm
from fastroute.nn.routed import forward_with_routing
from fastroute.nn.router import Router, Routing, set_gate_norm
from fastroute.nn.sparse import SparseRouter, SparseRouting, leave_spread_paths

__all__ = [
    "ConsistencyLoss",
    "CrossConnection",
    "CrossPrediction2d",
    "CrossPredictionLinear",
    "CrossStitch",
    "FusedSequential",
    "GateClusteringLoss",
    "GateNorm",
    "MixtureEMLoss",
    "MultiPathNetwork",
    "ParallelPaths",
    "RelevanceNorm",
    "Router",
    "Routing",
    "SparseRouter",
    "SparseRouting",
    "block_end",
    "exact_convolutions",
    "forward_with_routing",
    "leave_spread_paths",
    "residual_sum",
    "set_gate_norm",
]
