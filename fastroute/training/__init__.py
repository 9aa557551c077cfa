"""Training with Lightning: module, data and run files. Needs `pip install 'fastroute[train]'`."""

from fastroute._extras import extra

with extra("train", "fastroute.training"):
    from fastroute.data.module import ImageDataModule
    from fastroute.diagnostics.routing import gates_table, mean_gates, router_statistics, routing_share
    from fastroute.training.callbacks import RouterDiagnostics
    from fastroute.training.checkpoints import check_resume, epochs_done, load_weights, save_weights
    from fastroute.training.classifier import RoutingClassifier
    from fastroute.training.saving import Terminated
    from fastroute.training.trainer import fit

__all__ = [
    "ImageDataModule",
    "RouterDiagnostics",
    "RoutingClassifier",
    "Terminated",
    "check_resume",
    "epochs_done",
    "fit",
    "gates_table",
    "load_weights",
    "mean_gates",
    "router_statistics",
    "routing_share",
    "save_weights",
]
