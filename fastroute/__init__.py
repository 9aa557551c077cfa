"""Data-dependent routing for multi-path neural networks, with fused kernels (Tissera, 2023)."""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fastroute._version import __version__

__all__ = [
    "__version__",
    "backends",
    "compile_form",
    "create_model",
    "list_models",
    "load",
    "models",
    "multipath",
    "nn",
    "ops",
    "use_backend",
]


def _is_command() -> bool:
    """Return whether this process is `fastroute …` or `python -m fastroute …`, whose `--help` must not import torch."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # while Python is still looking for the module
        return "fastroute" in sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1]
    return Path(program).stem == "fastroute"


if TYPE_CHECKING or not _is_command():  # importing the package registers the operators in torch.ops.fastroute
    from fastroute import backends, models, nn, ops
    from fastroute.backends import use_backend
    from fastroute.inference import load
    from fastroute.models import create_model, list_models, multipath
    from fastroute.ops._compile_form import compile_form
else:
    _HOMES = {
        "compile_form": "ops._compile_form",
        "create_model": "models",
        "list_models": "models",
        "load": "inference",
        "use_backend": "backends",
        "multipath": "models",
    }

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        home = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
        return getattr(home, name) if name in _HOMES else home
