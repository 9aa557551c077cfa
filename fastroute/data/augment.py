"""Augment and normalise whole batches. Images are uint8 (N, H, W, C)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def shift_and_flip(images: Tensor, offsets: Tensor, flips: Tensor, pad: int) -> Tensor:
    """Pad each image with `pad` black pixels on every side, crop it at its offset, and mirror it if its flip is set.

    Args:
        images: (N, H, W, C).
        offsets: (N, 2), row and column of the crop's corner in the padded image, 0 to 2·pad; `pad` is no shift.
        flips: (N,) bool, whether an image is mirrored left to right.
        pad: the largest shift, in pixels.

    Returns:
        (N, H, W, C), contiguous.
    """
    count, height, width, channels = images.shape
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    samples, rows, columns = (torch.arange(size, device=images.device) for size in (count, height, width))
    rows = offsets[:, :1] + rows  # [N, H]
    columns = offsets[:, 1:] + torch.where(flips[:, None], width - 1 - columns, columns)  # [N, W]
    # index_select over whole pixels takes a third of the time of padded[samples, rows, columns].
    pixels = (samples[:, None, None] * padded.shape[1] + rows[:, :, None]) * padded.shape[2] + columns[:, None, :]
    return padded.view(-1, channels).index_select(0, pixels.flatten()).view_as(images)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise each channel by its mean and standard deviation.

    Args:
        images: uint8 (N, H, W, C).
        mean, std: (C,), in units of the uint8 values.

    Returns:
        float32 (N, C, H, W), in channels_last strides.
    """
    rows = images.flatten(2).to(torch.float32)  # [N, H, W·C], for a long inner loop
    width = images.shape[2]
    return rows.sub_(mean.repeat(width)).div_(std.repeat(width)).view_as(images).permute(0, 3, 1, 2)


def erase(images: Tensor, probability: float) -> Tensor:
    """Erase a random rectangle of some images: set it to 0, the mean of normalised images.

    The area is 2 to 33 % of the image's. The aspect ratio is 0.3 to 3.3, uniform in the logarithm, as in timm and
    torchvision. Sides are at most those of the image.

    Args:
        images: (N, C, H, W), not changed.
        probability: that an image is changed, independently of others.

    Returns:
        (N, C, H, W).
    """
    count, _, height, width = images.shape
    draws = torch.rand(count, 5)
    area = (0.02 + draws[:, 0] * (0.33 - 0.02)) * height * width
    ratio = torch.exp((draws[:, 1] * 2 - 1) * math.log(3.3))
    mask = (draws[:, 2] < probability)[:, None, None]
    for axis, (sides, size, place) in enumerate(
        (((area * ratio).sqrt(), height, draws[:, 3]), ((area / ratio).sqrt(), width, draws[:, 4])), start=1
    ):
        sides = sides.round().clamp(1, size)
        first = (place * (size - sides + 1)).floor()[:, None]
        pixels = torch.arange(size)
        inside = (pixels >= first) & (pixels < first + sides[:, None])  # [N, size]
        mask = mask & inside.unsqueeze(3 - axis)
    return images.masked_fill(mask[:, None].to(images.device, non_blocking=True), 0)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (C,) of uint8 images (N, H, W, C), from counts, without a float copy."""
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(-1)]).double()
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ values
    variance = (shares * (values - mean[:, None]).square()).sum(1)
    return mean.float(), variance.sqrt().float().clamp(min=1.0)
