"""The helpers that other tests rely on."""

import pytest
import torch

from tests.ops.cases import moved, paths


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "stacked", "sliced"])
def test_moved_paths_lie_as_they_did(layout):
    for x in paths(2, (3, 4, 5, 6), layout=layout):
        there = moved(x, "meta")
        assert there.device.type == "meta" and there.shape == x.shape and there.stride() == x.stride()
        assert there.storage_offset() == x.storage_offset()
        assert torch.equal(moved(x, "cpu"), x)


def test_float32_is_computed_in_float32():
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32
