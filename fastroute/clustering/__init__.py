"""Clustering by neural mixture models (§4.4). Needs `pip install 'fastroute[cluster]'`."""

from fastroute._extras import extra

with extra("cluster", "fastroute.clustering"):
    from fastroute.clustering.metrics import cluster_accuracy
    from fastroute.clustering.neural_mixture import NeuralMixture

__all__ = ["NeuralMixture", "cluster_accuracy"]
