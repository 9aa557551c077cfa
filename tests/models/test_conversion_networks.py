"""Networks of timm and torchvision, converted to parallel paths."""

import tarfile
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from fastroute.models import multipath

PHOTOGRAPHS = Path(__file__).parents[3] / "shared/data/imagenet-sample.tar"


TIMM = ["resnet10t", "mobilenetv3_small_050"]


TIMM_SLOW = [
    "resnet18",
    "vgg11_bn",
    "efficientnet_b0",
    "convnext_atto",
    "regnety_002",
    "mobilenetv2_050",
    "densenet121",
]


TORCHVISION = ["resnet18", "vgg11", "efficientnet_b0", "convnext_tiny", "regnet_y_400mf", "mobilenet_v3_small"]


def slow(names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", [*TIMM, *slow(TIMM_SLOW)])
def test_timm_networks(name):
    timm = pytest.importorskip("timm")
    check(timm.create_model(name, num_classes=5))


@pytest.mark.parametrize("name", slow(TORCHVISION))
def test_torchvision_networks(name):
    torchvision = pytest.importorskip("torchvision")
    check(getattr(torchvision.models, name)(num_classes=5))


def check(network):
    """The copy computes as the network does, has routers at several resolutions, and trains."""
    network.eval()
    model, x = multipath(network, 2, init="copy", noise=0), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, (logits, routing) = network(x), model(x, return_routing=True)
    assert len(routing) >= 4
    torch.testing.assert_close(logits, expected, rtol=1e-2, atol=1e-2 * expected.abs().max().item())
    model.train()(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.is_file(), reason=f"there are no photographs at {PHOTOGRAPHS}")
@pytest.mark.parametrize(
    "name", ["resnet18", "efficientnet_b0", "convnext_atto", "regnety_002", "mobilenetv3_small_050"]
)
def test_timm_networks_on_photographs(name, capsys):
    timm = pytest.importorskip("timm")
    images = photographs(8)
    model = multipath(timm.create_model(name), 2)
    logits, routing = model(images, return_routing=True)
    loss = F.cross_entropy(logits, torch.arange(8))
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
    assert logits.shape == (8, 1000) and loss.isfinite() and 0 < norm < float("inf")
    with capsys.disabled():
        parameters = sum(p.numel() for p in model.parameters())
        cuts = ", ".join(router.removesuffix("_router") for router in routing)
        print(f"\n{name}: {parameters:,} parameters, cut at {cuts}; loss {loss:.3f}, gradient norm {norm:.3f}")


def photographs(count):
    from PIL import Image
    from torchvision.transforms import v2

    transform = v2.Compose(
        [v2.ToImage(), v2.CenterCrop(224), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.45] * 3, [0.23] * 3)]
    )
    images = []
    with tarfile.open(PHOTOGRAPHS) as archive:
        for member in archive:
            if member.isfile() and len(images) < count:
                images.append(transform(Image.open(archive.extractfile(member)).convert("RGB")))
    return torch.stack(images)
