import pytest
import torch

from tests.backends.cuda_kernels.cases import LAYOUTS, make_paths
from tests.ops.cases import moved


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moving_keeps_strides(layout):
    """Shown without a card, on tensors of no memory."""
    for x in make_paths(3, (2, 3, 4, 5), torch.float32, layout, torch.Generator()):
        there = moved(x, "meta")
        assert (there.shape, there.stride(), there.storage_offset()) == (x.shape, x.stride(), x.storage_offset())
        assert moved(x, "cpu").data_ptr() == x.data_ptr()
