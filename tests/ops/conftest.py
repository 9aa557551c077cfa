import contextlib
import sys

import pytest
import torch

from fastroute import use_backend
from fastroute.backends import BACKENDS


@pytest.fixture(params=["default", "python", "reference"])
def backend(request, monkeypatch):
    """Run a test on the compiled kernels, as users do; on the path in Python without them; and on the reference.

    Triton's interpreter has tests of its own.
    """
    if request.param == "python":
        take_python(monkeypatch)
    with use_backend("reference") if request.param == "reference" else contextlib.nullcontext():
        yield request.param


def take_python(monkeypatch):
    """Have every operator checked, differentiated and computed by Python, with or without a compiled library."""
    for name in ("cross_connect", "mix", "gate", "cross_predict", "mixture_em"):
        module = sys.modules[f"fastroute.ops.{name}"]
        _, _, called = module._FORWARD._schema.name.partition("::")
        monkeypatch.setattr(module, "_FORWARD", getattr(torch.ops.fastroute_python, called).default)


@pytest.fixture
def refused(monkeypatch):
    """Return a function that checks that C++ and Python both refuse a call, with the same type of error and message."""

    def check(error, message, function, *args, **options):
        with pytest.raises(error, match=message) as compiled:
            function(*args, **options)
        take_python(monkeypatch)
        with pytest.raises(error, match=message) as python:
            function(*args, **options)
        assert python.type is compiled.type
        assert str(python.value) == str(compiled.value)

    return check


@pytest.fixture
def native_library():
    if reason := BACKENDS["native"].reason_against(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
