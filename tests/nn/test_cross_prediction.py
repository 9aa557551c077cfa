import math

import numpy as np
import pytest
import torch
from torch import nn

from fastroute.nn import CrossPrediction2d, CrossPredictionLinear, Routing


def paths(m, *shape, **options):
    return [torch.randn(shape, **options) for _ in range(m)]


def plain(layer, xs, predict):
    """Compute Alg. 1 for one layer in plain PyTorch; `predict` is the convolution or dense layer."""
    predictions, gates = [], []
    for i, x in enumerate(xs):
        biases = [None] * layer.out_paths if layer.bias is None else layer.bias[i]
        predictions.append([predict(x, w, b) for w, b in zip(layer.weight[i], biases, strict=True)])
        z = x.flatten(2).mean(-1) if x.dim() > 2 else x
        gates.append(torch.softmax(torch.relu(z @ layer.w1[i].T + layer.b1[i]) @ layer.w2[i].T + layer.b2[i], -1))
    outputs = []
    for j in range(layer.out_paths):
        shape = (-1, *[1] * (xs[0].dim() - 1))
        y = sum(g[:, j].reshape(shape) * u[j] for g, u in zip(gates, predictions, strict=True))
        y = y if layer.norms is None else layer.norms[j](y)
        outputs.append(torch.relu(y) if layer.activation else y)
    return outputs


@pytest.mark.parametrize("in_paths, out_paths", [(1, 3), (2, 2), (3, 1)])
@pytest.mark.parametrize("options", [{}, {"bias": False, "norm_layer": nn.BatchNorm2d}, {"activation": None}], ids=str)
def test_is_algorithm_1(in_paths, out_paths, options):
    layer = CrossPrediction2d(4, 6, (3, 2), in_paths, out_paths, 2, (1, 0), **options, dtype=torch.float64)
    nn.init.normal_(layer.w2)
    xs = paths(in_paths, 3, 4, 8, 9, dtype=torch.float64)
    expected = plain(layer, xs, lambda x, w, b: nn.functional.conv2d(x, w, b, 2, (1, 0)))
    for actual, wanted in zip(layer(xs), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("options", [{}, {"bias": False, "norm_layer": nn.BatchNorm1d}], ids=str)
def test_dense_is_algorithm_1(options):
    layer = CrossPredictionLinear(5, 7, 2, 3, **options, dtype=torch.float64)
    nn.init.normal_(layer.w2)
    xs = paths(2, 6, 5, dtype=torch.float64)
    for actual, wanted in zip(layer(xs), plain(layer, xs, nn.functional.linear), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_both_call_forms_agree():
    layer, xs = CrossPrediction2d(4, 6, 3, 2, 3), paths(2, 4, 4, 7, 7)
    outputs, routing = layer(xs, return_routing=True)
    assert isinstance(routing, Routing)
    assert routing.gates.shape == routing.scores.shape == (4, 2, 3)
    torch.testing.assert_close(routing.gates, torch.full((4, 2, 3), 1 / 3), atol=0.005, rtol=0)
    for y, again in zip(outputs, layer(xs), strict=True):
        assert torch.equal(y, again) and y.shape == (4, 6, 5, 5)


def test_predictions_start_as_a_convolution_and_a_dense_layer_do():
    torch.manual_seed(0)
    for layer, single, fan_in in (
        (CrossPrediction2d(16, 32, 3, 4, 4), nn.Conv2d(16, 512, 3), 144),
        (CrossPredictionLinear(50, 40, 4, 4), nn.Linear(50, 640), 50),
    ):
        for ours, theirs in ((layer.weight, single.weight), (layer.bias, single.bias)):
            assert ours.abs().max() <= 1 / math.sqrt(fan_in)
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.08)


def test_gradients_reach_every_parameter_and_input():
    layer = CrossPrediction2d(4, 6, 3, 2, 2, norm_layer=nn.BatchNorm2d)
    xs = paths(2, 4, 4, 7, 7, requires_grad=True)
    sum((y * torch.randn_like(y)).sum() for y in layer(xs)).backward()
    for name, tensor in (*layer.named_parameters(), *enumerate(xs)):
        assert tensor.grad is not None and (
            tensor.grad.abs().max() > 0 or name == "bias"
        )  # before a norm it is in vain


def test_parameters_are_optional_and_take_factory_arguments():
    bare = CrossPrediction2d(4, 6, 3, 2, 2, bias=False, gate_channels=None)
    assert {name for name, _ in bare.named_parameters()} == {"weight", "w2", "b2"}
    layer = CrossPredictionLinear(4, 6, 2, 2, norm_layer=nn.BatchNorm1d, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


def test_keeps_channels_last_and_takes_autocast():
    layer = CrossPrediction2d(4, 6, 3, 2, 2)
    xs = [x.to(memory_format=torch.channels_last) for x in paths(2, 4, 4, 7, 7)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs, routing = layer(xs, return_routing=True)
    assert all(y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last) for y in outputs)
    assert routing.gates.dtype == torch.float32


@pytest.mark.parametrize("norm_layer", [None, nn.BatchNorm2d])
def test_compiles_without_a_break(norm_layer):
    layer, xs = CrossPrediction2d(4, 6, 3, 2, 3, norm_layer=norm_layer), paths(2, 4, 4, 7, 7)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(xs), layer(xs), strict=True):
        torch.testing.assert_close(actual, expected)


def test_repr_is_its_arguments():
    assert repr(CrossPredictionLinear(4, 6, 2, 3, bias=False)) == (
        "CrossPredictionLinear(4, 6, in_paths=2, out_paths=3, gate_channels=16, bias=False, activation='relu')"
    )
    assert "kernel_size=(3, 3)" in repr(CrossPrediction2d(4, 6, 3, 2, 3))
    assert "stride=(2, 2), padding=(1, 1), dilation=(1, 1)" in repr(CrossPrediction2d(4, 6, 3, 2, 3, 2, 1))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"in_channels": 0}, "in_channels is 0; it must be at least 1"),
        ({"out_channels": 0}, "out_channels is 0; it must be at least 1"),
        ({"in_paths": 0}, "in_paths is 0; it must be 1 to 8"),
        ({"out_paths": 9}, "out_paths is 9; it must be 1 to 8"),
        ({"gate_channels": -1}, "gate_channels is -1"),
        ({"activation": "gelu"}, "activation is 'gelu'; it must be 'relu' or None"),
        ({"kernel_size": (3, 0)}, r"kernel_size is \(3, 0\); it must be an integer, or one for each .*, from 1 on"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size is \(3, 3, 3\); it must be an integer, or one for each of height"),
        ({"padding": "same"}, "padding is 'same'; it must be an integer, or one for each .*, from 0 on"),
        ({"stride": 1.5}, "stride is 1.5; it must be an integer"),
        ({"dilation": 0}, "dilation is 0; it must be an integer, or one for each of height and width, from 1 on"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrossPrediction2d(
            **{"in_channels": 4, "out_channels": 6, "kernel_size": 3, "in_paths": 2, "out_paths": 2, **arguments}
        )


@pytest.mark.parametrize(
    "xs, error, message",
    [
        (torch.zeros(2, 4, 5, 5), TypeError, "xs is a Tensor; it must be a list of tensors"),
        ([torch.zeros(2, 4, 5, 5)], ValueError, "xs has 1 paths; this router takes in_paths=2"),
        ([torch.zeros(2, 3, 5, 5)] * 2, ValueError, r"xs\[0\] has shape \(2, 3, 5, 5\).*in_channels=4"),
        ([torch.zeros(2, 4, 2, 5)] * 2, ValueError, "smaller than a kernel"),
    ],
)
def test_wrong_inputs(xs, error, message):
    with pytest.raises(error, match=message):
        CrossPrediction2d(4, 6, 3, 2, 2)(xs)


def test_kernel_sizes_are_integers_of_any_kind():
    layer = CrossPrediction2d(4, 4, np.int64(3), 2, 2, stride=(np.int32(2), 2), padding=np.int64(1))
    assert layer.weight.shape[-2:] == (3, 3) and layer.stride == (2, 2)
    assert all(type(number) is int for number in (*layer.stride, *layer.padding, *layer.dilation))
    assert layer([torch.randn(2, 4, 8, 8)] * 2)[0].shape == (2, 4, 4, 4)
    for wrong in (True, 1.5, 0, (3, 3, 3)):
        with pytest.raises(ValueError, match=r"kernel_size is .*; it must be an integer, or one for each"):
            CrossPrediction2d(4, 4, wrong, 2, 2)
