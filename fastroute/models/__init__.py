"""The named networks of the thesis, and any network made multi-path."""

import sys

from fastroute.models import (  # noqa: F401 (they register their networks)
    cifar_resnet,
    cnn,
    convnet_aig,
    highway,
    hypernetwork,
    imagenet_resnet,
)
from fastroute.models._cost import count_macs
from fastroute.models._timm import register_timm
from fastroute.models.conversion import multipath
from fastroute.models.ensemble import Ensemble
from fastroute.models.registry import ModelInfo, create_model, list_models, model_info, register_model
from fastroute.models.specification import Specification, specification_of

__all__ = [
    "Ensemble",
    "ModelInfo",
    "Specification",
    "count_macs",
    "create_model",
    "list_models",
    "model_info",
    "multipath",
    "register_model",
    "register_timm",
    "specification_of",
]

if "timm" in sys.modules:
    register_timm()
