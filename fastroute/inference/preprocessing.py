"""Prepare images for a network as in validation."""

from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastroute._defaults import CROP_PCT
from fastroute.ops._paths import check_integers

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

Picture = "str | Path | bytes | Image.Image | np.ndarray | Tensor"


@dataclass(frozen=True, eq=False)
class Preprocessing:
    """Scale an image, crop its centre square, and normalise it: float32 (C, img_size, img_size).

    Attributes:
        img_size: the height and width, in pixels.
        in_chans: 3 for RGB, 1 for grey.
        crop_pct: the crop's side, relative to the shorter side of the scaled image, which is img_size / crop_pct.
        interpolation: of scaling: "bilinear", "bicubic" or "nearest".
        mean, std: of each channel, or one for all, in units of the uint8 values. If the run did not keep them, they are
            None; a predictor then takes only normalised tensors.

    Example:
        >>> prepare = Preprocessing(224, crop_pct=0.875, mean=torch.tensor([127.5]), std=torch.tensor([127.5]))
        >>> prepare(torch.zeros(3, 300, 400, dtype=torch.uint8)).shape
        torch.Size([3, 224, 224])
    """

    img_size: int
    in_chans: int = 3
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    mean: Tensor | None = None
    std: Tensor | None = None

    @classmethod
    def of_run(cls, run: Mapping[str, Any], data: Mapping[str, Any]) -> "Preprocessing":
        """Return the preprocessing of a checkpoint.

        Args:
            run: its `hyper_parameters`, of checked types.
            data: its `ImageDataModule`, of checked types; empty for a run on other data, of which nothing is known.
        """
        return cls(
            data.get("img_size", run["img_size"]),
            data.get("in_chans", run["in_chans"]),
            data.get("crop_pct", CROP_PCT if data else 1.0),
            data.get("interpolation", "bilinear"),
            data.get("mean"),
            data.get("std"),
        )

    def __call__(self, image: Picture) -> Tensor:
        """Return the network's input for one image.

        Args:
            image: a path, the bytes of a file, a PIL image, or uint8 values in a NumPy array (H, W) or (H, W, C) or a
                tensor (C, H, W).

        Returns:
            (C, img_size, img_size), float32.

        Raises:
            ValueError: the run did not keep mean and std, or the network takes neither 1 nor 3 channels.
            UnreadableImage: the file cannot be read as an image.
            TypeError: image is of another type.
        """
        self.check()
        pixels = torch.from_numpy(self.cut(image).copy()).float()
        pixels = pixels.view(self.img_size, self.img_size, self.in_chans).permute(2, 0, 1)
        mean, std = (value.float().view(-1, 1, 1) for value in (self.mean, self.std))
        return ((pixels - mean) / std).contiguous()

    def cut(self, image: Picture) -> "np.ndarray":
        """Return the scaled and cropped image: uint8 (H, W) or (H, W, C)."""
        import numpy as np

        from fastroute.data.transforms import eval_transform

        cut = eval_transform(self.img_size, self.crop_pct, interpolation=self.interpolation)
        return np.asarray(cut(_picture(image, self.in_chans)))

    def check(self) -> None:
        """Check that images can be prepared.

        Raises:
            ValueError: the run did not keep mean and std, or the network takes neither 1 nor 3 channels.
        """
        if self.in_chans not in (1, 3):
            raise ValueError(
                f"the network takes images of {self.in_chans} channels, which no image file has; give the predictor "
                "tensors that are normalised"
            )
        if self.mean is None or self.std is None:
            raise ValueError(
                "the checkpoint does not say how its images were normalised; load it with mean=… and std=…, in units "
                "of 0 to 255, or give the predictor tensors that are normalised"
            )

    def check_sizes(self) -> None:
        """Check that sizes are in their range, and mean and std finite numbers for each channel, or one for all.

        Raises:
            TypeError: img_size is no integer.
            ValueError: they are not.
        """
        check_integers(img_size=self.img_size)
        if self.img_size < 1:
            raise ValueError(f"img_size is {self.img_size}; it must be at least 1")
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}; it must be above 0 and at most 1")
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value is not None and value.numel() not in (1, self.in_chans):
                raise ValueError(
                    f"{name} has {value.numel()} numbers; give one, or one for each of {self.in_chans} channels, in "
                    "units of 0 to 255"
                )
            if value is not None and not (value.isfinite().all() and (name == "mean" or value.min() > 0)):
                wanted = "finite" if name == "mean" else "finite and above 0"
                raise ValueError(f"{name} is {value.tolist()}; it must be {wanted}, in units of 0 to 255")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for a file's metadata; mean and std are in units of 0 to 1, as in most programs."""
        return {
            "img_size": self.img_size,
            "in_chans": self.in_chans,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
            "mean": None if self.mean is None else [value / 255 for value in self.mean.tolist()],
            "std": None if self.std is None else [value / 255 for value in self.std.tolist()],
        }

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.to_dict().items())
        return f"Preprocessing({values})"


def _picture(image: Picture, channels: int) -> "Image.Image":
    import numpy as np
    from PIL import Image

    from fastroute.data.decode import decode_image, upright

    if isinstance(image, Image.Image):
        return upright(image, channels)
    if isinstance(image, str | Path):
        return decode_image(image, str(image), channels)
    if isinstance(image, bytes):
        return decode_image(BytesIO(image), "the image", channels)
    given = image
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3:
        image = image.permute(1, 2, 0).cpu().numpy()
    drawable = isinstance(image, np.ndarray) and image.dtype == np.uint8
    if drawable and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))):
        return upright(Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image), channels)
    what = f"{type(given).__name__}"
    if hasattr(given, "shape"):
        what += f" of {given.dtype} and the shape {tuple(given.shape)}"
    raise TypeError(
        f"image is a {what}; it must be a path, bytes, a PIL image, uint8 values (H, W, C) in an array or (C, H, W) in "
        "a tensor"
    )
