import pytest
import torch

from fastroute import ops, use_backend
from tests.backends.triton_kernels.cases import assert_as_exact_as_eager, make_paths, mx, tables

MIX_CASES = {  # m, n, shape, dtype, layout, static
    "per sample": (2, 3, (3, 5, 7, 5), torch.float32, "first", False),
    "static": (3, 2, (3, 33, 2, 5), torch.bfloat16, "last", True),
    "several portions": (2, 2, (2, 9, 31, 33), torch.float32, "stacked", False),
    "several portions, static": (1, 2, (2, 9, 31, 33), torch.float16, "sliced", True),
    "eight paths": (8, 8, (2, 3), torch.float32, "first", False),
}


@pytest.mark.parametrize("case", MIX_CASES)
def test_mix(device, case, poison, launches):
    torch.manual_seed(8)
    m, n, shape, dtype, layout, static = MIX_CASES[case]
    xs = make_paths(m, shape, dtype, device, layout)
    gates = torch.randn(*([] if static else [shape[0]]), m, n, device=device)
    grads = make_paths(n, shape, dtype, device)

    def run(name, dtype=None):
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in xs]
        weights = gates.detach().to(dtype or gates.dtype).requires_grad_()
        with use_backend(name):
            outputs = ops.mix(inputs, weights)
            torch.autograd.backward(outputs, [g.to(dtype or g.dtype) for g in grads])
        tensors = [*outputs, weights.grad, *(x.grad for x in inputs)]
        return {str(i): tensor.detach() for i, tensor in enumerate(tensors)}

    got = run("triton")
    assert_as_exact_as_eager(got, run("reference"), run("reference", torch.float64))
    kernels = [launch.kernel for launch in launches]
    partial = ["sum_parts_kernel"] if static or "portions" in case else []
    assert kernels == ["mix_fwd_kernel", "mix_bwd_kernel", *partial]
    assert [x.data_ptr() for x in launches[0].args[0]] == [x.data_ptr() for x in xs]
    if "portions" in case:
        assert launches[0].grid[1] > 1


@pytest.mark.parametrize(("parts", "columns"), [(3, 70), (700, 3), (1, 1), (40, 300)])
def test_partial_sums(device, parts, columns, launches):
    values = torch.randn(2, parts, columns, device=device)
    out = torch.empty(2, columns, device=device)
    mx.launch_sum_parts(values, out, 2, parts, columns)
    torch.testing.assert_close(out, values.sum(1), rtol=1e-5, atol=1e-4)
    assert tables.partial_sums(6, 128)["COLUMNS"] == 128  # many rows of few parts: one program for each
    assert tables.partial_sums(4096, 4)["PARTS"] == 512
