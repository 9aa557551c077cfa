"""Measure the statistics and the cost of a network's routers."""

from fastroute._extras import extra
from fastroute.diagnostics.statistics import RouterStatistics, needed_paths

with extra("train", "fastroute.diagnostics"):
    from fastroute.diagnostics.routing import gates_table, mean_gates, router_statistics, routing_share, skewed_gates

__all__ = [
    "RouterStatistics",
    "gates_table",
    "mean_gates",
    "needed_paths",
    "router_statistics",
    "routing_share",
    "skewed_gates",
]
