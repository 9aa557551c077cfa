"""Figures of routing and of clusterings, and one page that shows them (§3.5, §4.5.3).

Each figure is a function from tensors or a model to a matplotlib `Figure`. `collect_routing` passes over the images
once, for all figures of gates. Needs `pip install 'fastroute[visualize]'`.
"""

from fastroute._extras import extra

with extra("visualize", "fastroute.visualize"):
    from fastroute.visualize.clusters import cluster_images, confusion, filter_images, response_map
    from fastroute.visualize.collect import (
        Gate,
        Layer,
        RoutingData,
        collect_flows,
        collect_responses,
        collect_routing,
        parallel_weights,
        path_similarity,
        weight_distance,
    )
    from fastroute.visualize.curves import accuracy_against_parameters, learning_curves
    from fastroute.visualize.page import Images, Report
    from fastroute.visualize.paths import similarity_matrices, weight_histograms
    from fastroute.visualize.report import clustering_report, routing_report
    from fastroute.visualize.routing import (
        class_histograms,
        colour_explained,
        gate_context,
        gate_health,
        gate_maximization,
        routing_flow,
        variance_explained,
    )
    from fastroute.visualize.synthesis import synthesize, synthesize_filters, synthesize_gates, synthesize_outputs

__all__ = [
    "Gate",
    "Images",
    "Layer",
    "Report",
    "RoutingData",
    "accuracy_against_parameters",
    "class_histograms",
    "cluster_images",
    "clustering_report",
    "collect_flows",
    "collect_responses",
    "collect_routing",
    "colour_explained",
    "confusion",
    "filter_images",
    "gate_context",
    "gate_health",
    "gate_maximization",
    "learning_curves",
    "parallel_weights",
    "path_similarity",
    "response_map",
    "routing_flow",
    "routing_report",
    "similarity_matrices",
    "synthesize",
    "synthesize_filters",
    "synthesize_gates",
    "synthesize_outputs",
    "variance_explained",
    "weight_distance",
    "weight_histograms",
]
