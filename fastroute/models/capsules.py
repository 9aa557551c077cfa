"""The capsule network of Sabour, Frosst and Hinton (2017), a baseline of Table 3.2."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastroute.models.registry import register_model
from fastroute.nn import Routing
from fastroute.nn._classifier import Classifies
from fastroute.nn._specification import specification_kept
from fastroute.ops._library import without_autocast

PRIMARY, CLASS = 8, 16  # the sizes of capsules
TINY = 1e-8


def squash(s: Tensor) -> Tensor:
    """Scale vectors to lengths |s|² / (1 + |s|²), below 1.

    Args:
        s: (…, D).
    """
    wide = _wide(s)
    square = wide.square().sum(-1, keepdim=True)
    return (wide * (square + TINY).sqrt() / (1 + square)).to(s.dtype)


def _wide(s: Tensor) -> Tensor:
    """Return float16 in float32, in which `TINY` is not 0, and any other type as it is."""
    return s.float() if s.dtype == torch.float16 else s


class ClassCapsules(nn.Module):
    """A capsule for each class, to which the primary capsules agree by dynamic routing.

    Args:
        in_features: the numbers in all primary capsules, a multiple of 8.
        out_features: the number of classes.
        iterations: of the routing.

    Shape:
        x: (N, in_features), squashed primary capsules.
        output: (N, out_features, 16), capsules before they are squashed.
    """

    def __init__(self, in_features: int, out_features: int, iterations: int = 3, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.iterations = in_features, out_features, iterations
        shape = (out_features, in_features // PRIMARY, CLASS, PRIMARY)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device.type):
            votes = torch.einsum("kioc,nic->nkio", self.weight, x.to(self.weight.dtype).unflatten(1, (-1, PRIMARY)))
            scores = torch.zeros_like(votes[..., 0])
            for _ in range(self.iterations - 1):
                capsules = squash(torch.einsum("nki,nkio->nko", scores.softmax(1), votes))
                scores = scores + torch.einsum("nkio,nko->nki", votes, capsules)
            return torch.einsum("nki,nkio->nko", scores.softmax(1), votes)


class Decoder(nn.Module):
    """Reconstruct an image from the capsule of one class by three dense layers.

    The paper masks the other classes' capsules by zeros, so the first layer amounts to a separate one for each class.

    Args:
        num_classes: the number of classes.
        shape: of an image, (channels, height, width).

    Shape:
        capsule: (N, 16), squashed.
        classes: (N,), whose capsules they are.
        output: (N, *shape), from 0 to 1.
    """

    def __init__(self, num_classes: int, shape: tuple[int, int, int], device=None, dtype=None):
        super().__init__()
        like = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(num_classes, CLASS, 512, **like))
        self.bias = nn.Parameter(torch.empty(512, **like))
        self.layers = nn.Sequential(
            nn.ReLU(inplace=True),
            nn.Linear(512, 1024, **like),
            nn.ReLU(inplace=True),
            nn.Linear(1024, math.prod(shape), **like),
            nn.Sigmoid(),
            nn.Unflatten(1, shape),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the parameters of the first layer as `nn.Linear` does."""
        bound = 1 / math.sqrt(CLASS * max(self.weight.shape[0], 1))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, capsule: Tensor, classes: Tensor) -> Tensor:
        return self.layers(torch.einsum("nc,nch->nh", capsule, self.weight[classes]) + self.bias)


class CapsNet(Classifies, nn.Module):
    """Two convolutions, primary capsules, and class capsules by dynamic routing, with a decoder that regularises.

    A class capsule's length p is the probability that the class is there, and its score is the log-odds of p. So the
    softmax of the scores are the classes' probabilities given that exactly one is there. `training_loss` is the paper's
    margin loss, and `reconstruction` times the sum of squared errors of the image that the decoder makes of the right
    class's capsule.

    Args:
        channels: of the first convolution.
        capsules: the number of primary capsules at each pixel, of 8 numbers each.
        kernel_size: of both convolutions.
        iterations: of the routing.
        reconstruction: the weight of the reconstruction.
        num_classes, in_chans: as in `create_model`.
        img_size: of the images.

    Shape:
        x: (N, in_chans, img_size, img_size).
        output: scores (N, num_classes); with `return_routing=True` also an empty dict: there are no routers.

    Raises:
        ValueError: img_size is too small for the convolutions, or another argument is out of range.
    """

    def __init__(
        self,
        channels: int = 256,
        capsules: int = 32,
        kernel_size: int = 9,
        iterations: int = 3,
        reconstruction: float = 0.0005,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int = 32,
    ):
        super().__init__()
        sizes = {"channels": channels, "capsules": capsules, "kernel_size": kernel_size, "iterations": iterations}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if reconstruction < 0:
            raise ValueError(f"reconstruction is {reconstruction}; it must be at least 0")
        if img_size < 2 * kernel_size - 1:
            raise ValueError(
                f"img_size is {img_size}; it must be at least {2 * kernel_size - 1} for two convolutions of "
                f"{kernel_size}×{kernel_size} without padding: enlarge the images, or lower kernel_size"
            )
        self.shape = in_chans, img_size, img_size
        self.iterations, self.reconstruction = iterations, reconstruction
        self.stem = nn.Sequential(nn.Conv2d(in_chans, channels, kernel_size), nn.ReLU(inplace=True))
        self.primary = nn.Conv2d(channels, capsules * PRIMARY, kernel_size, stride=2)
        size = (img_size - 2 * kernel_size + 1) // 2 + 1
        self.classes = ClassCapsules(capsules * PRIMARY * size**2, num_classes, iterations)
        self.decoder = Decoder(num_classes, self.shape)

    def forward(
        self, x: Tensor, return_routing: bool = False, return_capsules: bool = False
    ) -> Tensor | tuple[Tensor, dict[str, Routing]]:
        """Return scores, as every network returns logits.

        Args:
            x: (N, in_chans, img_size, img_size).
            return_routing: whether to return an empty dict too.
            return_capsules: whether to return the class capsules instead, (N, num_classes, 16), before they are
                squashed.
        """
        if return_capsules:
            return self.classes(self._capsules(self._body(x)[0][0]))
        return super().forward(x, return_routing)

    def _body(self, x: Tensor, maps: list[list[Tensor]] | None = None) -> tuple[list[Tensor], dict[str, Routing]]:
        if x.shape[1:] != self.shape:
            given, expected = (" × ".join(map(str, shape)) for shape in (x.shape[1:], self.shape))
            raise ValueError(f"images are of {given}; this network is built for {expected}: give in_chans and img_size")
        x = self.stem(x)
        y = self.primary(x)
        if maps is not None:
            maps += [[x], [y]]
        return [y], {}

    def _capsules(self, x: Tensor) -> Tensor:
        """Return the primary capsules of a map, squashed, as (N, in_features)."""
        return squash(x.unflatten(1, (-1, PRIMARY)).flatten(3).transpose(2, 3)).flatten(1)

    def _head(self, xs: list[Tensor]) -> list[Tensor]:
        y = self.classes(self._capsules(xs[0]))
        return [y if self._without else scores_of(y)]

    def _heads(self) -> list[str]:
        return ["classes"]

    def _classifiers(self) -> list[str]:
        if "_width" not in self.__dict__:
            self._width = {"classes": self.classes.in_features}
        return ["classes"]

    def _new_classifier(self, in_features: int, out_features: int, **like) -> nn.Module:
        return ClassCapsules(in_features, out_features, self.iterations, **like)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        with specification_kept(self, num_classes=num_classes):
            super().reset_classifier(num_classes, global_pool)
            like = self.decoder.bias
            self.decoder = Decoder(num_classes, self.shape, device=like.device, dtype=like.dtype)

    def training_loss(self, images: Tensor, targets: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, and its scores.

        Args:
            images: (N, in_chans, img_size, img_size).
            targets: (N, num_classes), shares of the classes.
            progress: not used: the loss is the same throughout a run.
        """
        capsules = self(images, return_capsules=True)
        square = capsules.square().sum(-1)
        length = square / (1 + square)
        present, absent = F.relu(0.9 - length).square(), F.relu(length - 0.1).square()
        loss = (targets * present + 0.5 * (1 - targets) * absent).sum(1).mean()
        if self.reconstruction:
            made = self._decode(capsules, targets.argmax(1))
            loss = loss + self.reconstruction * (made - unit_range(images)).square().flatten(1).sum(1).mean()
        return loss, scores_of(capsules)

    def reconstruct(self, x: Tensor, classes: Tensor | None = None) -> Tensor:
        """Return the images that the decoder makes of class capsules, with values from 0 to 1.

        Args:
            x: images (N, in_chans, img_size, img_size).
            classes: (N,), of the capsules; None takes the longest of each image.
        """
        capsules = self(x, return_capsules=True)
        return self._decode(capsules, scores_of(capsules).argmax(1) if classes is None else classes)

    def _decode(self, capsules: Tensor, classes: Tensor) -> Tensor:
        return self.decoder(squash(capsules[torch.arange(len(classes), device=classes.device), classes]), classes)


def scores_of(capsules: Tensor) -> Tensor:
    """Return the log-odds (N, K) of the lengths of class capsules (N, K, 16).

    The length of a squashed capsule is |s|² / (1 + |s|²), so its log-odds are log |s|².
    """
    return (_wide(capsules).square().sum(-1) + TINY).log().to(capsules.dtype)


def unit_range(images: Tensor) -> Tensor:
    """Scale each image to values from 0 to 1, which normalisation has taken from it.

    Args:
        images: (N, C, H, W).
    """
    least, most = (value[:, None, None, None] for value in images.flatten(1).aminmax(dim=1))
    return (images - least) / (most - least).clamp_min(TINY)


@register_model(table="3.2", params="8.2")
def capsnet(**options) -> nn.Module:
    """Build the capsule network of Sabour et al. (2017).

    Table 3.2's 8.2 million parameters are those of the network for grey images of 28×28, for which
    `create_model("capsnet", in_chans=1, img_size=28)` has as many; for colour images of 32×32 it has 11.7 million. The
    error there is the paper's, of seven networks together on crops of 24×24.
    """
    return CapsNet(**options)
