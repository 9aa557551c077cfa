import sys

import pytest


@pytest.fixture(autouse=True)
def nothing_compiled():
    """What one test compiled does not count against the next one's limit of recompilations."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
