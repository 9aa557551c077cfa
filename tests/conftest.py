import sys
from collections import Counter

import pytest
import torch

from tests import costs

# Tests in float32 have bounds for float32: on a GPU, convolutions would round their inputs to TF32 otherwise.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

# CPU seconds from which a test is left to `make test`, to `make test-thorough`, and from which its file comes first.
LONG, THOROUGH, FIRST = 0.2, 0.8, 10


OWN_NETWORK = """
from torch import nn

def build(num_classes, width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(width, num_classes))

number = 3
layer = nn.Linear(2, 3)
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record-costs", action="store_true", help="write the tests' CPU seconds to tests/costs.txt")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("record_costs"):
        config.pluginmanager.register(costs.Recorder())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seconds = costs.read()
    for item in items:
        cost = seconds.get(item.nodeid, 0)
        if cost >= THOROUGH and not item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.thorough)
        elif cost >= LONG:
            item.add_marker(pytest.mark.long)
    # Otherwise one process may begin with a long test when the others have nothing left to do.
    longest = Counter()
    for item in items:
        longest[item.path] = max(longest[item.path], seconds.get(item.nodeid, 0))
    items.sort(key=lambda item: -longest[item.path] if longest[item.path] >= FIRST else 0)


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Reset Dynamo, so that one test's compilations do not count towards the recompilation limit of the next."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a user's module that builds a network into the working folder, and return its name."""
    (tmp_path / "own_nets.py").write_text(OWN_NETWORK)
    monkeypatch.chdir(tmp_path)
    yield "own_nets:build"
    sys.modules.pop("own_nets", None)
