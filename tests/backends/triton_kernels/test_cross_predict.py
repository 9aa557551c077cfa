import pytest
import torch

from fastroute import ops, use_backend
from fastroute.ops._paths import channels_first, channels_last
from tests.backends.triton_kernels.cases import check_operator, make_paths, small_tiles
from tests.ops.cases import eager_cross_predict

PREDICT_CASES = {  # m, n, C_out, kernel, (N, C_in, *S), dtype, layout, form, bias, activation
    "one to many": (1, 3, 6, (3, 3), (2, 3, 7, 5), torch.float32, "first", "predict", True, "relu"),
    "channels_last": (3, 2, 17, (3, 3), (2, 9, 6, 5), torch.float32, "last", "predict", False, "relu"),
    "gated inputs": (2, 3, 5, (2, 3), (3, 6, 7, 5), torch.float32, "stacked", "gate", True, None),
    "gated channels_last": (2, 2, 16, (1, 1), (2, 16, 5, 7), torch.bfloat16, "last", "gate", True, "relu"),
    "one channel": (2, 3, 1, (3, 3), (2, 4, 7, 5), torch.float32, "last", "predict", True, "relu"),
    "gated to one channel": (2, 3, 1, (3, 3), (2, 4, 7, 5), torch.float32, "last", "gate", True, None),
    "dense": (2, 2, 7, (), (3, 9), torch.float32, "first", "predict", True, "relu"),
    "eight paths": (8, 8, 2, (), (2, 3), torch.float32, "first", "predict", True, None),
}


@pytest.mark.parametrize("steps", ["one", "several"])
@pytest.mark.parametrize("case", PREDICT_CASES)
def test_cross_predict(device, case, steps, monkeypatch, poison, launches):
    torch.manual_seed(12)
    m, n, width, kernel, shape, dtype, layout, form, bias, activation = PREDICT_CASES[case]
    if steps == "several":
        small_tiles(monkeypatch)
    weight, offset = torch.randn(m, n, width, shape[1], *kernel, device=device), torch.randn(m, n, width, device=device)
    gates = torch.rand(shape[0], m, n, device=device)

    def predict(weight, bias, gates, *xs):
        return ops.cross_predict(list(xs), weight, bias, gates, activation=activation, form=form)

    inputs = [weight, offset if bias else None, gates, *make_paths(m, shape, dtype, device, layout)]
    got = check_operator(predict, eager_cross_predict(activation), inputs, kink=activation == "relu")
    assert all((channels_last if layout == "last" else channels_first)(got[str(j)]) for j in range(n))
    kernels = {launch.kernel for launch in launches}
    assert {"sum_predictions_kernel", "scale_paths_kernel", "sum_gradients_kernel"} <= kernels
    if steps == "several" and len(shape) > 2:
        assert all(launch.grid[1] > 1 for launch in launches if launch.kernel == "sum_gradients_kernel")


def test_cross_predict_of_nothing_and_of_nan(device, launches):
    xs = make_paths(2, (0, 4, 3, 3), torch.float32, device)
    weight = torch.randn(2, 3, 5, 4, 1, 1, device=device, requires_grad=True)
    with use_backend("triton"):
        outputs = ops.cross_predict(xs, weight, None, torch.rand(0, 2, 3, device=device))
        sum(y.sum() for y in outputs).backward()
    assert outputs[0].shape == (0, 5, 3, 3) and not weight.grad.any() and not launches
    xs = make_paths(2, (2, 4, 3, 3), torch.float32, device)
    xs[0][1, 2, 0, 0] = float("nan")
    with use_backend("triton"):
        y = ops.cross_predict(xs, weight, None, torch.rand(2, 2, 3, device=device))[0]
    assert y[1, :, 0, 0].isnan().all() and not y[0].isnan().any()
