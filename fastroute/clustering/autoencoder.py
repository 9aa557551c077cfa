"""Autoencoders on the networks of Table 4.2, and k-means of their codes, as Lightning modules."""

import itertools
import math
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.clustering.centers import FeatureClustering
from fastroute.clustering.module import check_positive
from fastroute.clustering.networks import layers_of

if TYPE_CHECKING:
    from fastroute.clustering.build import Setting

Variant = Literal["ae", "sparse-ae", "denoising-ae", "vae"]


def autoencoder(
    architecture: str, shape: torch.Size, code: int, outputs: int, batch_norm: bool = True
) -> tuple[nn.Sequential, nn.Sequential]:
    """Build the layers of an architecture as an encoder, and in reverse as a decoder.

    The encoder sees pixels, not their edges: the decoder is to reproduce them. The decoder has nearest-neighbour
    upsampling in the place of pools, and its last layer has no activation.

    Args:
        architecture: as `clustering_network` takes it.
        shape: (C, H, W) of an image.
        code: the inputs of the decoder.
        outputs: the outputs of the encoder.
        batch_norm: whether batch norm follows each convolution but the last.

    Returns:
        the encoder, (N, C, H, W) → (N, outputs), and the decoder, (N, code) → (N, C, H, W).

    Raises:
        ValueError: the architecture is unknown, or the image is too small for its pools.
    """
    (channels, *size), layers = shape, layers_of(architecture)
    encoder: list[nn.Module] = []
    mirrored: list[nn.Module] = []  # the decoder's convolutions, from the last

    def norm(width: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]

    for kind, width in layers:
        if kind == "M":
            encoder.append(nn.MaxPool2d(2))
            mirrored.append(nn.Upsample(tuple(size)))
            size = [side // 2 for side in size]
        elif kind == "C":
            encoder += [nn.Conv2d(channels, width, 3, padding=1, bias=not batch_norm), *norm(width)]
            first = not any(isinstance(layer, nn.Conv2d) for layer in mirrored)
            mirrored += [] if first else norm(channels)[::-1]
            mirrored.append(nn.Conv2d(width, channels, 3, padding=1, bias=first or not batch_norm))
            channels = width
    if min(size) < 1:
        raise ValueError(f"img_size is {shape[-1]}; it is too small for the pools of {architecture!r}")
    widths = [channels * math.prod(size), *(width for kind, width in layers if kind == "F")]
    encoder.append(nn.Flatten())
    for inputs, width in itertools.pairwise(widths):
        encoder += [nn.Linear(inputs, width), nn.ReLU()]
    encoder.append(nn.Linear(widths[-1], outputs))
    decoder: list[nn.Module] = []
    for inputs, width in itertools.pairwise([code, *widths[::-1]]):
        decoder += [nn.Linear(inputs, width), nn.ReLU()]
    if not any(isinstance(layer, nn.Conv2d) for layer in mirrored):
        decoder.pop()  # the last layer is this dense one
    decoder.append(nn.Unflatten(1, (channels, *size)))
    return nn.Sequential(*encoder), nn.Sequential(*decoder, *mirrored[::-1])


def sparsity(activations: Tensor, rho: float) -> Tensor:
    """Return Σ_j KL(ρ ‖ ρ̂_j) of the mean activations ρ̂_j of a batch.

    Args:
        activations: (N, D), from 0 to 1.
        rho: ρ, the mean activation to have.

    Returns:
        ().
    """
    mean = activations.float().mean(0).clamp(1e-6, 1 - 1e-6)
    return (rho * (rho / mean).log() + (1 - rho) * ((1 - rho) / (1 - mean)).log()).sum()


def gaussian_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(μ, σ²) ‖ N(0, 1)), summed over the dimensions and averaged over the samples.

    Args:
        mean, log_variance: (N, D), μ and log σ².

    Returns:
        ().
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()


def gaussian_loss(means: Tensor, images: Tensor) -> Tensor:
    """Return −log p(x) of pixels x from N(means, s²), with the one s² for a batch that makes it least.

    Args:
        means: (N, C, H, W).
        images: (N, C, H, W).

    Returns:
        (), summed over the pixels of an image, averaged over the images.
    """
    variance = (means.float() - images).square().mean().clamp(min=1e-6)
    return images[0].numel() / 2 * ((2 * math.pi * variance).log() + 1)


class Autoencoder(FeatureClustering):
    """Cluster images by k-means of the code that an autoencoder learns.

    All variants are trained by Adam. All but "vae" minimise the cross-entropy between pixels and their reproductions,
    summed over the pixels:
    - "ae": nothing else.
    - "sparse-ae" (Ng 2011): the code has `SPARSE` sigmoid units; β Σ_j KL(ρ ‖ ρ̂_j) keeps their mean activations at ρ.
    - "denoising-ae" (Vincent et al. 2010): a quarter of the values that the encoder sees are 0.
    - "vae" (Kingma & Welling 2014): the code is a sample of N(μ, σ²), and KL(N(μ, σ²) ‖ N(0, 1)) is added; k-means is
      of μ. The pixels are Gaussian with means from 0 to 1, as the paper has it for real values: with the cross-entropy
      of grey ones, which is never near 0, the code of the digits was useless for the first 20 epochs. The divergence
      may warm up (Sønderby et al. 2016): in full from the beginning, it made the code constant for good in some runs.

    Args:
        architecture: as `clustering_network` takes it; the code follows its layers.
        shape: (C, H, W) of an image.
        num_clusters: K.
        variant: which of them.
        code: dimensions of the code; None is 10, and `SPARSE` of "sparse-ae".
        batch_norm: whether batch norm follows each convolution.
        lr: the learning rate of Adam.
        warm_up: the epochs in which the weight of the divergence of "vae" grows from 0 to 1, in equal steps; 0 is none.
        seed: of k-means.

    Raises:
        ValueError: the variant or architecture is unknown, `lr` is not positive, or `warm_up` is negative.
    """

    SCHEDULE = ("warm_up",)
    SPARSE, RHO, BETA = 128, 0.05, 3.0
    NOISE = 0.25

    def __init__(
        self,
        architecture: str,
        shape: torch.Size,
        num_clusters: int,
        *,
        variant: Variant = "ae",
        code: int | None = None,
        batch_norm: bool = True,
        lr: float = 1e-3,
        warm_up: int = 0,
        seed: int = 0,
    ):
        if variant not in get_args(Variant):
            raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(get_args(Variant))}")
        check_positive(lr=lr)
        if warm_up < 0:
            raise ValueError(f"warm_up is {warm_up}; it must be at least 0")
        code = code or (self.SPARSE if variant == "sparse-ae" else 10)
        super().__init__(num_clusters, code, seed)
        self.variant, self.lr, self.warm_up = variant, lr, warm_up
        outputs = 2 * code if variant == "vae" else code
        self.encoder, self.decoder = autoencoder(architecture, shape, code, outputs, batch_norm)
        if variant == "vae":  # as in the paper: the divergence is small at first, and does not silence the layer before
            nn.init.normal_(self.encoder[-1].weight, std=0.01)
            nn.init.zeros_(self.encoder[-1].bias)

    def configure_optimizers(self):
        return torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], lr=self.lr)

    def divergence_weight(self) -> float:
        """Return the weight of the divergence of "vae" in the epoch."""
        return min(1.0, self.current_epoch / self.warm_up) if self.warm_up else 1.0

    def features(self, images: Tensor) -> Tensor:
        """Return the codes (N, D) of images (N, C, H, W)."""
        code = self.encoder(images)
        if self.variant == "vae":
            return code.chunk(2, 1)[0]
        return code.sigmoid() if self.variant == "sparse-ae" else code

    def step(self, images: Tensor, index: Tensor | None) -> Tensor:
        seen, penalty = images, 0.0
        if self.variant == "denoising-ae":
            seen = images * (torch.rand(images.shape).to(images.device) >= self.NOISE)
        if self.variant == "vae":
            mean, log_variance = self.encoder(seen).float().chunk(2, 1)
            noise = torch.randn(mean.shape).to(mean.device)
            code = mean + noise * (log_variance / 2).exp()
            penalty = self.divergence_weight() * gaussian_divergence(mean, log_variance)
        else:
            code = self.features(seen)
        if self.variant == "sparse-ae":
            penalty = self.BETA * sparsity(code, self.RHO)
        made = self.decoder(code).float()
        if self.variant == "vae":
            return gaussian_loss(made.sigmoid(), images) + penalty
        wrong = F.binary_cross_entropy_with_logits(made, images, reduction="none")
        return wrong.flatten(1).sum(1).mean() + penalty


def build(setting: "Setting") -> Autoencoder:
    """Build the module of a run of an autoencoder."""
    run = setting.run
    module = Autoencoder(
        run.architecture,
        setting.shape,
        run.clusters,
        variant=run.method,
        batch_norm=run.batch_norm,
        warm_up=setting.epochs // 3,
        seed=setting.seed,
    )
    return setting.laid_out(module)
