"""Transforms of one decoded image, from torchvision's v2."""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as TF
from torchvision.transforms import v2

from fastroute.data.decode import check_pixels

CROP_MODES = ("rrc", "rkrc", "rkrr", "random")
SCALES = {"rrc": (0.08, 1.0), "rkrc": (0.8, 1.0), "rkrr": (0.8, 1.0), "random": (1.0, 1.0)}
RATIOS = {"rrc": (3 / 4, 4 / 3), "rkrc": (0.9, 1 / 0.9), "rkrr": (0.9, 1 / 0.9), "random": (1.0, 1.0)}
"""The default ranges of area and aspect ratio for each mode; timm's, if timm has the mode."""
INTERPOLATIONS = ("bilinear", "bicubic", "nearest")


class AugMix(v2.AugMix):
    """Mix as torchvision does, with all random numbers drawn on the CPU, whose generator the loaders seed."""

    def _sample_dirichlet(self, params: Tensor) -> Tensor:
        return super()._sample_dirichlet(params.cpu()).to(params.device)


POLICIES = {
    "imagenet": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET),
    "cifar10": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "svhn": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.SVHN),
    "trivial": v2.TrivialAugmentWide,
    "augmix": AugMix,
}
MAX_MAGNITUDE, MAX_OPERATIONS = 30, 16
"""The limits of RandAugment: torchvision's largest magnitude, and a bound on the time of an image."""


def policy(aa: str) -> v2.Transform:
    """Return an automatic augmentation by name.

    Args:
        aa: "imagenet", "cifar10" or "svhn", of AutoAugment; "trivial"; "augmix"; or RandAugment as "rand-m9-n2", of
            magnitude m (0 to 30, 9 by default) and n operations (1 to 16, 2 by default), all of which are applied.

    Raises:
        ValueError: there is no augmentation of that name.
    """
    if aa in POLICIES:
        return POLICIES[aa]()
    if match := re.fullmatch(r"rand(?:-m(\d{1,2}))?(?:-n(\d{1,2}))?", aa, re.ASCII):
        magnitude, operations = int(match[1] or 9), int(match[2] or 2)
        if magnitude <= MAX_MAGNITUDE and 1 <= operations <= MAX_OPERATIONS:
            return v2.RandAugment(operations, magnitude)
    raise ValueError(
        f"aa is {aa!r}; it must be one of {', '.join(map(repr, POLICIES))}, or such as 'rand-m9-n2' with m from 0 to "
        f"{MAX_MAGNITUDE} and n from 1 to {MAX_OPERATIONS}"
    )


def resize_size(img_size: int, crop_pct: float) -> int:
    """Return the shorter side of the scaled image from which `img_size` is cropped: 256 for 224 with crop_pct 0.875.

    Raises:
        ValueError: crop_pct is not above 0 and at most 1, or a square of that side has too many pixels.
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct is {crop_pct}; it must be above 0 and at most 1")
    side = img_size / crop_pct
    if (limit := Image.MAX_IMAGE_PIXELS) is not None and side * side > limit:
        raise ValueError(
            f"img_size is {img_size} and crop_pct {crop_pct}; img_size / crop_pct is the side of a scaled image, and "
            f"must be at most {math.isqrt(limit):,}"
        )
    return int(side)


def check_crop(scale: Sequence[float] | None, ratio: Sequence[float] | None) -> None:
    """Check the ranges of the crop's area, as a share of the image, and aspect ratio; None takes the mode's own.

    Raises:
        ValueError: a range is not two numbers in rising order, or is out of bounds.
    """
    for name, pair, low, high in (("scale", scale, 0, 1), ("ratio", ratio, 1e-3, 1e3)):
        if pair is None:
            continue
        numbers = len(pair) == 2 and all(isinstance(value, int | float) for value in pair)
        if not numbers or not low <= pair[0] <= pair[1] <= high or pair[0] == 0:
            least = f"at least {low}" if low else "above 0"
            raise ValueError(
                f"{name} is {pair}; it must be two numbers {least} and at most {high:g}, the smaller first"
            )


def train_transform(
    img_size: int,
    crop_mode: str,
    scale: Sequence[float] | None,
    ratio: Sequence[float] | None,
    crop_pct: float,
    aa: str | None,
    interpolation: str = "bilinear",
    variation: Sequence[Callable[[Image.Image], Image.Image]] = (v2.RandomHorizontalFlip(),),
) -> Callable[[Image.Image], Image.Image]:
    """Return a transform of Pillow images that crops at random, varies the image, and applies a policy.

    Args:
        img_size: the height and width of the result, in pixels.
        crop_mode: "rrc" crops a random area of aspect ratio `ratio` and share `scale` of the image, and scales it.
            timm's "rkrc" and "rkrr" scale the shorter side to img_size, half of the time enlarged to leave a share
            `scale` of the area and half of the time stretched by `ratio`, and crop the centre or a random square.
            "random" scales the shorter side to img_size / crop_pct and crops a random square: the thesis's 256 → 224.
        scale, ratio: ranges of area and aspect ratio; None takes the mode's own, `SCALES` and `RATIOS`.
        crop_pct: see `resize_size`.
        aa: see `policy`; None applies none.
        interpolation: one of `INTERPOLATIONS`.
        variation: transforms between the crop and the policy.
    """
    check_crop(scale, ratio)
    scale, ratio = scale or SCALES[crop_mode], ratio or RATIOS[crop_mode]
    mode = v2.InterpolationMode(interpolation)
    if crop_mode == "rrc":
        crop = [v2.RandomResizedCrop(img_size, scale, ratio, mode, antialias=True)]
    elif crop_mode == "random":
        crop = [_Scale(resize_size(img_size, crop_pct), mode), v2.RandomCrop(img_size)]
    else:
        crop = [_Jitter(img_size, scale, ratio, mode, at_random=crop_mode == "rkrr")]
    return v2.Compose([*crop, *variation, *([policy(aa)] if aa else [])])


def variation(hflip: float, vflip: float, color_jitter: float) -> list[v2.Transform]:
    """Return the transforms that vary an image besides its crop; those with a value of 0 are left out.

    Args:
        hflip, vflip: the probabilities of mirroring left to right and upside down.
        color_jitter: the largest relative change of brightness, contrast and saturation.
    """
    jitter = 3 * (color_jitter,)
    return [
        *([v2.RandomHorizontalFlip(hflip)] if hflip else []),
        *([v2.RandomVerticalFlip(vflip)] if vflip else []),
        *([v2.ColorJitter(*jitter)] if color_jitter else []),
    ]


class _Jitter(nn.Module):
    """Do as timm's modes "rkrc" and "rkrr": `ResizeKeepRatio`, then `CenterCropOrPad` or `RandomCropOrPad`."""

    def __init__(self, img_size: int, scale: Sequence[float], ratio: Sequence[float], mode, *, at_random: bool):
        super().__init__()
        self.img_size, self.scale, self.ratio, self.mode, self.at_random = img_size, scale, ratio, mode, at_random

    def forward(self, image: Image.Image) -> Image.Image:
        zoomed, area, stretched, by = torch.rand(4).tolist()
        enlarged = (self.scale[0] + area * (self.scale[1] - self.scale[0])) ** -0.5 if zoomed < 0.5 else 1.0
        low, high = (math.log(side) for side in self.ratio)
        aspect = math.exp((low + by * (high - low)) / 2) if stretched < 0.5 else 1.0
        shrunk = min(image.size) / self.img_size
        width = max(1, round(image.width * (enlarged * aspect) / shrunk))
        height = max(1, round(image.height * (enlarged / aspect) / shrunk))
        check_pixels(width, height, f"{image.width:,} × {image.height:,} scaled for {self.img_size:,} are")
        return self._cut(TF.resize(image, [height, width], self.mode))

    def _cut(self, image: Image.Image) -> Image.Image:
        size = self.img_size
        margins = image.height - size, image.width - size
        if self.at_random:
            top, left = (int(math.copysign(torch.randint(abs(m) + 1, ()).item(), m)) for m in margins)
        else:
            top, left = (-(-m // 2) if m < 0 else round(m / 2) for m in margins)
        if min(margins) < 0:
            before = [max(0, -left), max(0, -top)]
            after = [max(0, left + size - image.width), max(0, top + size - image.height)]
            image = TF.pad(image, before + after, padding_mode="reflect")
        return TF.crop(image, max(0, top), max(0, left), size, size)


def eval_transform(
    img_size: int, crop_pct: float, ten_crop: bool = False, interpolation: str = "bilinear"
) -> Callable[[Image.Image], Image.Image | tuple[Image.Image, ...]]:
    """Return a transform that scales the shorter side to img_size / crop_pct and crops the centre square.

    Args:
        img_size: the side of the square, in pixels.
        crop_pct: see `resize_size`.
        ten_crop: crop the corners and the centre, and these five mirrored, instead.
        interpolation: one of `INTERPOLATIONS`.
    """
    scale = _Scale(resize_size(img_size, crop_pct), v2.InterpolationMode(interpolation))
    return v2.Compose([scale, v2.TenCrop(img_size) if ten_crop else v2.CenterCrop(img_size)])


class _Scale(v2.Resize):
    """Scale the shorter side to `size`; raise `UnreadableImage` if the result has too many pixels."""

    def forward(self, image: Image.Image) -> Image.Image:
        check_scaled(image, self.size[0])
        return super().forward(image)


def check_scaled(image: Image.Image, size: int) -> None:
    """Check that an image has not too many pixels with its shorter side scaled to `size`.

    Raises:
        UnreadableImage: it has; see `check_pixels`.
    """
    width, height = image.size
    shorter = min(width, height)
    check_pixels(width * size // shorter, height * size // shorter, f"{width:,} × {height:,} scaled to {size:,} are")


def pixels(image: Image.Image | tuple[Image.Image, ...]) -> np.ndarray:
    """Return an image as uint8 (H, W, C), or its crops as (crops, H, W, C)."""
    if isinstance(image, tuple):
        return np.stack([pixels(crop) for crop in image])
    values = np.array(image)
    return values[..., None] if values.ndim == 2 else values
