from fastroute.backends.reference import kernels as reference
from tests.backends.cuda_kernels.cases import ALIGNED, DTYPES, LAYOUTS, ODD, check, grid, make_case


@grid(sizes=ALIGNED + ODD, dtype=DTYPES, layout=LAYOUTS)
def test_gate(kernels, sizes, dtype, layout):
    xs, parameters, _, grads = make_case(*sizes, dtype, layout)
    check(kernels, "gate", (xs, *parameters))
    gates, _, pooled, hidden = reference.gate(xs, *parameters)
    for given in (grads, [grads[0], None], [None, grads[1]]):
        check(kernels, "gate_backward", (*given, xs, *parameters, gates, pooled, hidden))
