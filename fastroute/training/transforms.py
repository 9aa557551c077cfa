"""What workers do to one decoded image, from torchvision's v2 transforms."""

import re
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

CROP_MODES = ("rrc", "rkrc")
POLICIES = {
    "imagenet": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET),
    "cifar10": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "svhn": lambda: v2.AutoAugment(v2.AutoAugmentPolicy.SVHN),
    "trivial": v2.TrivialAugmentWide,
    "augmix": v2.AugMix,
}


def policy(aa: str) -> v2.Transform:
    """An automatic augmentation by name: AutoAugment's "imagenet", "cifar10" and "svhn", "trivial", "augmix", or
    RandAugment as "rand-m9-n2", of magnitude m (0 to 30, 9 by default) and n operations (2 by default).

    Raises:
        ValueError: there is none of that name.
    """
    if aa in POLICIES:
        return POLICIES[aa]()
    if match := re.fullmatch(r"rand(?:-m(\d+))?(?:-n([1-9]\d*))?", aa):
        magnitude, operations = int(match[1] or 9), int(match[2] or 2)
        if magnitude <= 30:
            return v2.RandAugment(operations, magnitude)
    raise ValueError(f"aa is {aa!r}; it must be one of {', '.join(map(repr, POLICIES))}, or such as 'rand-m9-n2'")


def resize_size(img_size: int, crop_pct: float) -> int:
    """The shorter side from which `img_size` is cut: 256 for 224 with crop_pct 0.875."""
    return int(img_size / crop_pct)


def train_transform(
    img_size: int, crop_mode: str, scale: Sequence[float], ratio: Sequence[float], crop_pct: float, aa: str | None
) -> Callable[[Image.Image], Image.Image]:
    """PIL image → PIL image of img_size × img_size, cropped at random, mirrored half of the time, then `aa`.

    "rrc" cuts a random area of aspect ratio `ratio` and share `scale` of the image, and scales it; "rkrc" scales the
    shorter side to img_size / crop_pct, keeps the ratio, and cuts a random square: the thesis's 256 → 224.
    """
    if crop_mode == "rrc":
        crop = [v2.RandomResizedCrop(img_size, scale, ratio, antialias=True)]
    else:
        crop = [v2.Resize(resize_size(img_size, crop_pct)), v2.RandomCrop(img_size)]
    return v2.Compose([*crop, v2.RandomHorizontalFlip(), *([policy(aa)] if aa else [])])


def eval_transform(
    img_size: int, crop_pct: float, ten_crop: bool = False
) -> Callable[[Image.Image], Image.Image | tuple[Image.Image, ...]]:
    """The shorter side scaled to img_size / crop_pct, then the centre square; or the corners, the centre, and these
    five mirrored."""
    resize = v2.Resize(resize_size(img_size, crop_pct), InterpolationMode.BILINEAR, antialias=True)
    return v2.Compose([resize, v2.TenCrop(img_size) if ten_crop else v2.CenterCrop(img_size)])


def pixels(image: Image.Image | tuple[Image.Image, ...]) -> np.ndarray:
    """uint8 (H, W, C), or (crops, H, W, C)."""
    return np.stack([np.asarray(crop) for crop in image]) if isinstance(image, tuple) else np.array(image)
