"""What workers do to one decoded image, from torchvision's v2 transforms."""

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from torchvision.transforms import v2

from fastroute.data.sources import check_pixels

CROP_MODES = ("rrc", "rkrc")
POLICIES = {
    "imagenet": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET),
    "cifar10": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "svhn": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.SVHN),
    "trivial": v2.TrivialAugmentWide,
    "augmix": v2.AugMix,
}
MAX_MAGNITUDE, MAX_OPERATIONS = 30, 16
"""Of RandAugment: torchvision has magnitudes up to this, and an image takes time in proportion to the operations."""


def policy(aa: str) -> v2.Transform:
    """An automatic augmentation by name: AutoAugment's "imagenet", "cifar10" and "svhn", "trivial", "augmix", or
    RandAugment as "rand-m9-n2", of magnitude m (0 to 30, 9 by default) and n operations (1 to 16, 2 by default).

    Raises:
        ValueError: there is none of that name.
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
    """The shorter side from which `img_size` is cut: 256 for 224 with crop_pct 0.875.

    Raises:
        ValueError: crop_pct is not above 0 and at most 1, or a square of that side has more pixels than an image may
            have.
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


def check_crop(scale: Sequence[float], ratio: Sequence[float]) -> None:
    """Raise unless these are ranges for "rrc": shares of an image, and width by height."""
    for name, pair, low, high in (("scale", scale, 0, 1), ("ratio", ratio, 1e-3, 1e3)):
        numbers = len(pair) == 2 and all(isinstance(value, int | float) for value in pair)
        if not numbers or not low <= pair[0] <= pair[1] <= high or pair[0] == 0:
            least = f"at least {low}" if low else "above 0"
            raise ValueError(
                f"{name} is {pair}; it must be two numbers {least} and at most {high:g}, the smaller first"
            )


def train_transform(
    img_size: int,
    crop_mode: str,
    scale: Sequence[float],
    ratio: Sequence[float],
    crop_pct: float,
    aa: str | None,
    variation: Sequence[Callable[[Image.Image], Image.Image]] = (v2.RandomHorizontalFlip(),),
) -> Callable[[Image.Image], Image.Image]:
    """PIL image → PIL image of img_size × img_size, cropped at random, varied by `variation`, then `aa`.

    "rrc" cuts a random area of aspect ratio `ratio` and share `scale` of the image, and scales it; "rkrc" scales the
    shorter side to img_size / crop_pct, keeps the ratio, and cuts a random square: the thesis's 256 → 224.
    """
    if crop_mode == "rrc":
        check_crop(scale, ratio)
        crop = [v2.RandomResizedCrop(img_size, scale, ratio, antialias=True)]
    else:
        crop = [_Scale(resize_size(img_size, crop_pct)), v2.RandomCrop(img_size)]
    return v2.Compose([*crop, *variation, *([policy(aa)] if aa else [])])


def variation(hflip: float, vflip: float, color_jitter: float) -> list[v2.Transform]:
    """What varies an image besides its crop: mirroring left to right and upside down, then brightness, contrast and
    saturation by up to a share of `color_jitter`, each where it is not 0."""
    jitter = 3 * (color_jitter,)
    return [
        *([v2.RandomHorizontalFlip(hflip)] if hflip else []),
        *([v2.RandomVerticalFlip(vflip)] if vflip else []),
        *([v2.ColorJitter(*jitter)] if color_jitter else []),
    ]


def eval_transform(
    img_size: int, crop_pct: float, ten_crop: bool = False
) -> Callable[[Image.Image], Image.Image | tuple[Image.Image, ...]]:
    """The shorter side scaled to img_size / crop_pct, then the centre square; or the corners, the centre, and these
    five mirrored."""
    scale = _Scale(resize_size(img_size, crop_pct))
    return v2.Compose([scale, v2.TenCrop(img_size) if ten_crop else v2.CenterCrop(img_size)])


class _Scale(v2.Resize):
    """Scale the shorter side to `size`; raise `UnreadableImage` where that gives too many pixels."""

    def forward(self, image: Image.Image) -> Image.Image:
        check_scaled(image, self.size[0])
        return super().forward(image)


def check_scaled(image: Image.Image, size: int) -> None:
    """Raise for an image so long that it would have too many pixels with its shorter side scaled to `size`.

    Raises:
        UnreadableImage: see `check_pixels`.
    """
    width, height = image.size
    shorter = min(width, height)
    check_pixels(width * size // shorter, height * size // shorter, f"{width:,} × {height:,} scaled to {size:,} are")


def pixels(image: Image.Image | tuple[Image.Image, ...]) -> np.ndarray:
    """uint8 (H, W, C), or (crops, H, W, C)."""
    return np.stack([np.asarray(crop) for crop in image]) if isinstance(image, tuple) else np.array(image)
