import pytest
import torch

from fastroute import ops, use_backend
from fastroute.backends import BACKENDS


@pytest.fixture(params=["reference", "native"])
def backend(request):
    """Every backend that serves CPU tensors as they are; Triton's interpreter has tests of its own."""
    if reason := BACKENDS[request.param].reason_against(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def native_library():
    if reason := BACKENDS["native"].reason_against(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    with use_backend("native"):
        ops.mix([torch.zeros(1, 1)], torch.ones(1, 1))  # loads it
