"""The transform T of §4.4.3, for batches on the training device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastroute.ops._library import without_autocast


@dataclass(frozen=True)
class Augmentation:
    """Shift, rotate, scale and mirror each image at random in one resampling, then change brightness and contrast.

    Attributes:
        shift: the largest shift, as a share of the image.
        degrees: the largest rotation in either direction.
        scale: the largest change of size, as a share.
        brightness, contrast: the largest change, as a share.
        flip: whether to mirror half of the images left to right.
    """

    shift: float = 0.1
    degrees: float = 20.0
    scale: float = 0.15
    brightness: float = 0.2
    contrast: float = 0.2
    flip: bool = False

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return augmented copies of images; the area beyond a border is black.

        Args:
            images: (N, C, H, W), values from 0 to 1.
            generator: of the random draws; None is PyTorch's default.
        """
        with without_autocast(images.device.type):  # which would round places to eight bits
            return self._moved(images, generator)

    def _moved(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        count = len(images)
        # Seven numbers from −1 to 1 for each image, drawn on the generator's device.
        draws = 2 * torch.rand(7, count, generator=generator) - 1
        angle, scale, right, down, mirror, brightness, contrast = draws.to(images.device)
        angle, scale = angle * math.radians(self.degrees), 1 / (1 + self.scale * scale)
        sign = torch.where(mirror < 0, -1.0, 1.0) if self.flip else torch.ones_like(mirror)
        cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
        rows = (cos * sign, -sin, 2 * self.shift * right), (sin * sign, cos, 2 * self.shift * down)
        theta = torch.stack([torch.stack(row, -1) for row in rows], 1)  # [N, 2, 3]
        grid = F.affine_grid(theta.to(images.dtype), list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, align_corners=False)
        shape = (-1, 1, 1, 1)
        brightness, contrast = (
            (1 + most * by).view(shape) for most, by in ((self.brightness, brightness), (self.contrast, contrast))
        )
        mean = moved.mean((1, 2, 3), keepdim=True)
        return ((moved - mean) * contrast + mean * brightness).clamp(0, 1)
