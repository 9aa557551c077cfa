import sys

import pytest
import torch

# The bounds of float32 are those of float32: on a card, convolutions would round their inputs to TF32.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(autouse=True)
def nothing_compiled():
    """What one test compiled does not count against the next one's limit of recompilations."""
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
