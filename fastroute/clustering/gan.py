"""k-means of the features of a GAN's discriminator (DCGAN; Radford et al. 2016), as a Lightning module."""

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.clustering.centers import FeatureClustering
from fastroute.clustering.module import check_positive

if TYPE_CHECKING:
    from fastroute.clustering.build import Setting

LATENT, WIDTH, GRID = 100, 64, 4
"""DCGAN's dimensions of the noise, filters of the first layer, and side of the grid that features are pooled to."""


def levels(shape: torch.Size) -> tuple[list[tuple[int, int]], list[int]]:
    """Return the sizes and widths of the discriminator's maps, from the image's to one with a side of 2 or 3.

    Args:
        shape: (C, H, W) of an image.

    Raises:
        ValueError: a side of the image is below 4.
    """
    channels, height, width = shape
    sizes = [(height, width)]
    while min(sizes[-1]) >= 4:
        sizes.append((sizes[-1][0] // 2, sizes[-1][1] // 2))
    if len(sizes) == 1:
        raise ValueError(f"img_size is {min(height, width)}; the method 'gan' needs images of at least 4 × 4 pixels")
    return sizes, [channels, *(WIDTH << level for level in range(len(sizes) - 1))]


class Discriminator(nn.Module):
    """Strided 4×4 convolutions with leaky ReLUs, batch norm from the second on, and a dense layer.

    Args:
        shape: (C, H, W) of an image.
    """

    def __init__(self, shape: torch.Size):
        super().__init__()
        sizes, widths = levels(shape)
        self.levels = nn.ModuleList()
        for level, (inputs, width) in enumerate(itertools.pairwise(widths)):
            norm = [nn.BatchNorm2d(width)] if level else []
            convolution = nn.Conv2d(inputs, width, 4, 2, 1, bias=not level)
            self.levels.append(nn.Sequential(convolution, *norm, nn.LeakyReLU(0.2)))
        self.dense = nn.Linear(widths[-1] * sizes[-1][0] * sizes[-1][1], 1)
        self.dims = sum(
            width * min(GRID, size[0]) * min(GRID, size[1]) for width, size in zip(widths[1:], sizes[1:], strict=True)
        )

    def forward(self, images: Tensor) -> Tensor:
        for level in self.levels:
            images = level(images)
        return self.dense(images.flatten(1))[:, 0]

    def features(self, images: Tensor) -> Tensor:
        """Return the maps of all levels, each max-pooled to a grid of at most 4 × 4: (N, `dims`)."""
        parts = []
        for level in self.levels:
            images = level(images)
            grid = tuple(min(GRID, side) for side in images.shape[2:])
            parts.append(F.adaptive_max_pool2d(images, grid).flatten(1))
        return torch.cat(parts, 1)


def generator(shape: torch.Size) -> nn.Sequential:
    """Build the generator from noise (N, `LATENT`) to images of values from 0 to 1: the discriminator's mirror.

    Args:
        shape: (C, H, W) of an image.
    """
    sizes, widths = levels(shape)
    layers: list[nn.Module] = [
        nn.Linear(LATENT, widths[-1] * sizes[-1][0] * sizes[-1][1], bias=False),
        nn.Unflatten(1, (widths[-1], *sizes[-1])),
        nn.BatchNorm2d(widths[-1]),
        nn.ReLU(),
    ]
    for level in range(len(sizes) - 1, 0, -1):
        odd = tuple(side % 2 for side in sizes[level - 1])
        last = level == 1
        layers.append(nn.ConvTranspose2d(widths[level], widths[level - 1], 4, 2, 1, output_padding=odd, bias=last))
        layers += [nn.Sigmoid()] if last else [nn.BatchNorm2d(widths[level - 1]), nn.ReLU()]
    return nn.Sequential(*layers)


class GAN(FeatureClustering):
    """Cluster images by k-means of the features of the discriminator of a generative adversarial network.

    Discriminator and generator are DCGAN's, in as many levels as the image has halvings, and with the paper's settings:
    weights of standard deviation 0.02, Adam with a learning rate of 2e-4 and β₁ = 0.5, a step of each a batch. The
    features are those that the paper gives its classifier: the maps of all levels, max-pooled to 4 × 4.

    Args:
        shape: (C, H, W) of an image.
        num_clusters: K.
        lr: the learning rate of both.
        seed: of k-means.

    Raises:
        ValueError: `lr` is not positive, or the image is below 4 × 4.
    """

    NETWORK = "DCGAN"

    def __init__(self, shape: torch.Size, num_clusters: int, *, lr: float = 2e-4, seed: int = 0):
        check_positive(lr=lr)
        discriminator = Discriminator(shape)
        super().__init__(num_clusters, discriminator.dims, seed)
        self.discriminator, self.generator, self.lr = discriminator, generator(shape), lr
        self.automatic_optimization = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def configure_optimizers(self):
        networks = self.discriminator, self.generator
        return [torch.optim.Adam(network.parameters(), lr=self.lr, betas=(0.5, 0.999)) for network in networks]

    def features(self, images: Tensor) -> Tensor:
        """Return the discriminator's features (N, D) of images (N, C, H, W)."""
        return self.discriminator.features(images)

    def step(self, images: Tensor, index: Tensor | None) -> None:
        made = self.generator(torch.randn(len(images), LATENT).to(images.device))
        real, false = self.discriminator(images).float(), self.discriminator(made.detach()).float()
        discriminator, generator = self.optimizers()
        losses = {"discriminator_loss": F.softplus(-real).mean() + F.softplus(false).mean()}
        self.descend(discriminator, losses["discriminator_loss"])
        losses["generator_loss"] = F.softplus(-self.discriminator(made).float()).mean()
        self.descend(generator, losses["generator_loss"])
        self.log_dict(losses, on_step=False, on_epoch=True, batch_size=len(images))


def build(setting: "Setting") -> GAN:
    """Build the module of a run of a GAN."""
    return setting.laid_out(GAN(setting.shape, setting.run.clusters, seed=setting.seed))
