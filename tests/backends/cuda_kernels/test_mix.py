import torch

from tests.backends.cuda_kernels.cases import ALIGNED, DTYPES, ODD, check, grid, make_case


@grid(
    sizes=[ALIGNED[0], ALIGNED[2], ODD[0], ODD[3], ODD[4]],
    dtype=DTYPES,
    shared=(True, False),
    grad_inputs=(True, False),
)
def test_mix(kernels, sizes, dtype, shared, grad_inputs):
    m, n, _shape, *_ = sizes
    xs, _, grad_outputs, (gates, _) = make_case(*sizes, dtype, "channels_last")
    gates = torch.randn(m, n, dtype=gates.dtype) if shared else gates
    check(kernels, "mix", (xs, gates))
    check(kernels, "mix_backward", (grad_outputs, xs, gates, grad_inputs))
