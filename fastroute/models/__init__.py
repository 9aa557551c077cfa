"""The named networks of the thesis."""

from fastroute.models import cifar_resnet  # noqa: F401 (registers its networks)
from fastroute.models.registry import create_model, list_models, register_model

__all__ = ["create_model", "list_models", "register_model"]
