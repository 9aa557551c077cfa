import pytest
import torch

from fastroute import ops
from tests.backends.triton_kernels.cases import CASES, check_operator, make_gate, make_paths, small_tiles
from tests.ops.cases import eager_cross_connect


@pytest.mark.parametrize("steps", ["one", "several"])
@pytest.mark.parametrize("case", [name for name in CASES if name != "eight paths"])
def test_gate(device, case, steps, monkeypatch, poison, launches):
    torch.manual_seed(11)
    m, n, shape, dtype, layout, hidden, bias = CASES[case]
    if steps == "several":
        small_tiles(monkeypatch)
    gate = make_gate(m, n, shape[1], hidden, device, bias)
    inputs = [*gate, *make_paths(m, shape, dtype, device, layout)]
    check_operator(
        lambda *a: tuple(ops.gate(list(a[4:]), *a[:4])), lambda *a: eager_cross_connect(a[4:], *a[:4])[-2:], inputs
    )
    kernels = ["pool_fwd", "gate_fwd", "gate_bwd", "weights_bwd"]
    assert [launch.kernel for launch in launches] == [f"cross_connect_{name}_kernel" for name in kernels] * 2
