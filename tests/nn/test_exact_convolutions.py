import copy
import math

import pytest
import torch
from torch import nn

from fastroute.models import create_model, multipath
from fastroute.nn import exact_convolutions

# A layer, and the size of a map for which PyTorch has it wrong.
LAYERS = [
    (nn.Conv1d(8, 5, 2, stride=3, padding=1), (2,)),
    (nn.Conv2d(8, 8, 3, padding=1), (1, 1)),
    (nn.Conv2d(8, 8, 3, padding="same"), (1, 1)),
    (nn.Conv2d(8, 8, (1, 5), padding=(0, 2)), (3, 1)),
    (nn.Conv2d(8, 8, 3, padding=1, groups=4), (1, 1)),
    (nn.Conv2d(2, 5, (2, 1), stride=(3, 2), padding=(0, 1), dilation=(1, 2)), (9, 1)),
    (nn.Conv3d(8, 5, (7, 1, 1), padding=(1, 0, 0), dilation=(1, 1, 2)), (6, 5, 14)),
    (nn.Conv2d(8, 8, 3, stride=(1, 2)), (8, 3)),
    (nn.Conv2d(16, 2, (1, 5), stride=(1, 3), padding=(2, 2), bias=False), (4, 1)),
    (nn.Conv3d(8, 2, (1, 2, 3), stride=(1, 1, 2), padding=(0, 2, 1)), (2, 3, 2)),
    (nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="circular"), (16, 2)),
    (nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="replicate"), (16, 2)),
]


def gradients(layer, x, weights):
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y, *torch.autograd.grad(y, [x, *layer.parameters()], weights.to(y.dtype))]


def free_nans():
    """Fill memory with NaN and free it: a convolution that reads memory without writing it gets NaN."""
    for count in (1 << 8, 1 << 12, 1 << 16):
        for value in [torch.full((count,), math.nan) for _ in range(50)]:
            del value


def test_a_single_map():
    layer = exact_convolutions(nn.Conv2d(8, 8, 3, stride=2, padding=1)).bfloat16()
    x = torch.randn(8, 16, 2).bfloat16()
    free_nans()
    assert torch.equal(layer(x), layer(x.unsqueeze(0)).squeeze(0)) and layer(x).isfinite().all()


@pytest.mark.parametrize(("layer", "size"), LAYERS, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_layers_that_pytorch_has_wrong(layer, size, autocast):
    layer = copy.deepcopy(layer)
    layer.load_state_dict({name: value.bfloat16() for name, value in layer.state_dict().items()})
    x = torch.randn(4, layer.in_channels, *size).bfloat16().float()
    weights = torch.randn_like(layer(x)).bfloat16().float()
    free_nans()
    exact = [t.float() for t in gradients(copy.deepcopy(layer).double(), x.double(), weights)]
    ours = exact_convolutions(copy.deepcopy(layer))
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(ours, x, weights)
    else:
        found = gradients(ours.bfloat16(), x.bfloat16(), weights)
    assert found[0].dtype == torch.bfloat16
    for value, true in zip(found, exact, strict=True):
        torch.testing.assert_close(value.float(), true, rtol=0.02, atol=0.02 * true.abs().max().item())


def test_other_layers_and_numbers_stay():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding_mode="circular"))
    exact, x = exact_convolutions(copy.deepcopy(network)), torch.randn(2, 3, 9, 9)
    assert torch.equal(exact(x), network(x))
    assert torch.equal(exact.bfloat16()(x.bfloat16()), network.bfloat16()(x.bfloat16()))
    assert exact.state_dict().keys() == network.state_dict().keys()
    assert repr(exact) == repr(network) and isinstance(exact[0], nn.Conv2d)


@pytest.mark.parametrize("build", ["named", "converted"])
def test_a_network_for_small_images_learns_in_bfloat16(build):
    """The last stage has maps of one pixel, for which a plain network may get non-finite weight gradients."""
    torch.manual_seed(0)
    network = create_model("resnet18_cc2", 10, 1, 8)
    if build == "converted":
        network = multipath(create_model("resnet18", 10, 1, 8), 2, input_size=(1, 8, 8))
    network = network.to(memory_format=torch.channels_last)
    x, labels = torch.randn(4, 1, 8, 8).contiguous(memory_format=torch.channels_last), torch.arange(4)

    def norms():
        network.zero_grad()
        nn.functional.cross_entropy(network(x), labels).backward()
        return torch.stack([p.grad.norm() for p in network.parameters() if p.dim() == 4])

    exact = norms()
    with torch.autocast("cpu", torch.bfloat16):
        found = norms()
    assert found.isfinite().all()
    # Rounding decides which ReLUs of so few samples are active: two correct gradients differ by a factor of up to two.
    assert exact.norm() / 3 < found.norm() < 3 * exact.norm()


def test_one_channel_in_channels_last():
    layer = exact_convolutions(nn.Conv2d(1, 2, 3, stride=(1, 2)))
    x = torch.randn(4, 9, 3, 1).movedim(-1, 1)
    torch.testing.assert_close(layer(x), copy.deepcopy(layer).double()(x.double()).float())


@pytest.mark.parametrize("dims, size", [(1, (1, 2, 8, 8)), (2, (1, 2, 4, 4, 4)), (2, (3,))])
def test_maps_of_other_dimensions_are_refused_by_pytorch(dims, size):
    layer = exact_convolutions(getattr(nn, f"Conv{dims}d")(2, 3, 3))
    with pytest.raises(RuntimeError, match=rf"Expected .* to conv{dims}d"):
        layer(torch.randn(size))


def test_grey_images_in_a_network_for_colours_are_named():
    network = exact_convolutions(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with pytest.raises(RuntimeError, match=r"expected input\[2, 1, 8, 8\] to have 3 channels, but got 1 channels"):
        network(torch.randn(2, 1, 8, 8))
