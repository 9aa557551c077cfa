import pytest
import torch

from fastroute.clustering.networks import Sobel, clustering_network


@pytest.mark.parametrize(
    ("architecture", "size", "clusters", "millions"),
    [("mnist", 28, 10, 0.8), ("cifar", 32, 10, 1.3), ("stl10", 96, 10, 2.7)],
)
def test_parameters_of_table_4_2(architecture, size, clusters, millions):
    with torch.device("meta"):
        network = clustering_network(architecture, clusters, size, batch_norm=False)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions


def test_gives_one_score_for_each_cluster():
    for channels in (1, 3):
        for architecture in ("mnist", "cifar", "C4 M C8 M", "F16"):
            network = clustering_network(architecture, 7, 16)
            assert network(torch.rand(2, channels, 16, 16)).shape == (2, 7)


def test_starts_share_nothing():
    network = clustering_network("C4 M F8", 3, 8, n_init=2)
    images = torch.rand(5, 1, 8, 8)
    scores = network(images)
    assert scores.shape == (5, 6)
    scores[:, :3].sum().backward()
    first, second = network.networks
    assert first[1].weight.grad.any() and not second[1].weight.grad.any()
    torch.testing.assert_close(scores[:, 3:], second(images))


def test_sobel_sees_edges_and_no_colour():
    image = torch.zeros(1, 1, 6, 6)
    image[..., 3:] = 1
    across, down = Sobel()(image)[0]
    assert across[:, 2:4].eq(4).all() and not across[:, :2].any() and not across[:, 4:].any() and not down.any()
    down, across = Sobel()(image.mT)[0].flip(0).flip(0)
    assert not down.any() and across.any()
    grey = torch.rand(1, 1, 6, 6)
    torch.testing.assert_close(Sobel()(grey.expand(1, 3, 6, 6)), Sobel()(grey), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("architecture", "size", "message"),
    [
        ("resnet", 32, "architecture is 'resnet'; it must be 'mnist', 'cifar', 'stl10', or layers"),
        ("C64 F32 C64", 32, "architecture is 'C64 F32 C64'"),
        ("C0", 32, "architecture is 'C0'"),
        ("stl10", 4, "img_size is 4; it is too small"),
    ],
)
def test_bad_input(architecture, size, message):
    with pytest.raises(ValueError, match=message):
        clustering_network(architecture, 10, size)


def test_refuses_no_starts():
    with pytest.raises(ValueError, match="n_init is 0; it must be at least 1"):
        clustering_network("mnist", 10, 28, n_init=0)
