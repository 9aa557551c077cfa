import sys

import pytest
import torch

from fastroute import use_backend
from fastroute.backends import BACKENDS


@pytest.fixture(params=["default", "python", "reference", "native"])
def backend(request, monkeypatch):
    """The way that users take; Python's, which they take where nothing is compiled; and backends by name.

    Triton's interpreter has tests of its own.
    """
    if request.param == "default":
        yield request.param
    elif request.param == "python":
        take_python(monkeypatch)
        yield request.param
    else:
        if reason := BACKENDS[request.param].reason_against(torch.device("cpu"), torch.float32):
            pytest.skip(reason)
        with use_backend(request.param):
            yield request.param


def take_python(monkeypatch):
    """Have every operator checked, differentiated and computed by Python, with or without a compiled library."""
    for name in ("cross_connect", "mix", "gate", "cross_predict", "mixture_em"):
        module = sys.modules[f"fastroute.ops.{name}"]
        for operator in ("_FORWARD", "_BACKWARD"):
            _, _, called = getattr(module, operator)._schema.name.partition("::")
            monkeypatch.setattr(module, operator, getattr(torch.ops.fastroute_python, called).default)


@pytest.fixture
def native_library():
    if reason := BACKENDS["native"].reason_against(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
