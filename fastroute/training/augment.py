"""Augmentation and normalisation of a whole batch in one go. Images are uint8 (N, H, W, C)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def shift_and_flip(images: Tensor, offsets: Tensor, flips: Tensor, pad: int) -> Tensor:
    """Pad each image with `pad` black pixels on every side, cut the window at its offset, and mirror where asked.

    Args:
        images: (N, H, W, C).
        offsets: (N, 2), row and column of the window's corner in the padded image, 0 to 2·pad; `pad` is no shift.
        flips: (N,) bool, which images are mirrored left to right.
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
    """float32 (N, C, H, W), in channels_last strides, of mean 0 and standard deviation 1 for each channel.

    Args:
        images: uint8 (N, H, W, C).
        mean, std: (C,), in units of the uint8 values.
    """
    rows = images.flatten(2).to(torch.float32)  # [N, H, W·C]: a longer inner loop than C's three
    width = images.shape[2]
    return rows.sub_(mean.repeat(width)).div_(std.repeat(width)).view_as(images).permute(0, 3, 1, 2)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of uint8 images (N, H, W, C), from counts, so that no float copy is made."""
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(-1)]).double()
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ values
    variance = (shares * (values - mean[:, None]).square()).sum(1)
    return mean.float(), variance.sqrt().float().clamp(min=1.0)
