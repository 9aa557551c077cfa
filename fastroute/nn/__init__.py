"""Modules: the routing layers, and the containers that hold parallel paths."""

from fastroute.nn.containers import MultiPathNetwork, ParallelPaths
from fastroute.nn.cross_connection import CrossConnection
from fastroute.nn.cross_prediction import CrossPrediction2d, CrossPredictionLinear
from fastroute.nn.cross_stitch import CrossStitch
from fastroute.nn.exact_convolutions import exact_convolutions
from fastroute.nn.gate_clustering import GateClusteringLoss
from fastroute.nn.mixture_em import ConsistencyLoss, MixtureEMLoss, RelevanceNorm
from fastroute.nn.router import Router, Routing
from fastroute.nn.sparse import SparseRouter, SparseRouting

__all__ = [
    "ConsistencyLoss",
    "CrossConnection",
    "CrossPrediction2d",
    "CrossPredictionLinear",
    "CrossStitch",
    "GateClusteringLoss",
    "MixtureEMLoss",
    "MultiPathNetwork",
    "ParallelPaths",
    "RelevanceNorm",
    "Router",
    "Routing",
    "SparseRouter",
    "SparseRouting",
    "exact_convolutions",
]
