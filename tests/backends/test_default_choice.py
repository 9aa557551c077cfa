"""The backends that nobody names on a card, for a shape of each row of the table in csrc/ops/problem_sizes.h."""

import pytest
import torch

from fastroute.ops import _library
from tests.ops.cases import check_against_eager, parameters, paths
from tests.ops.conftest import take_python
from tests.ops.test_cross_connect import eager, routed

ROWS = {  # m, n, shape, dtype, whether native is first in the forward and in the backward
    "registers hold both": (2, 2, (4, 16, 32, 32), torch.bfloat16, (False, False)),
    "a backward of many samples": (2, 2, (265, 16, 32, 32), torch.float32, (False, True)),
    "a cluster holds both": (2, 2, (4, 256, 14, 14), torch.float32, (True, True)),
    "many channels": (2, 2, (2, 1024, 14, 14), torch.bfloat16, (False, False)),
    "more": (2, 2, (2, 256, 56, 56), torch.bfloat16, (False, False)),
    "a cluster holds what comes": (2, 3, (2, 64, 56, 56), torch.float32, (True, False)),
    "a cluster holds what leaves": (3, 2, (2, 64, 56, 56), torch.float32, (False, True)),
}


@pytest.mark.parametrize("row", ROWS)
def test_each_shape_is_of_its_row(row):
    if _library.NOT_COMPILED:
        pytest.skip(_library.NOT_COMPILED)
    m, n, (samples, channels, *space), dtype, native = ROWS[row]
    sizes = (samples, channels, space[0] * space[1], False, dtype.itemsize, m, n, 16, False)
    prefers = torch.ops.fastroute_native.cuda_prefers_native
    assert tuple(prefers(*sizes, backward) for backward in (False, True)) == native


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("way", ["default", "python"])
@pytest.mark.parametrize("row", ROWS)
def test_outputs_and_every_gradient(row, way, monkeypatch):
    if way == "python":
        take_python(monkeypatch)
    m, n, shape, dtype, _ = ROWS[row]
    inputs = [*parameters(m, n, shape[1], scale=0.3), *paths(m, shape, dtype)]
    check_against_eager(routed(m), eager, [t.to("cuda") for t in inputs])
