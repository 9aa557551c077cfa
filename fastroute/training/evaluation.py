"""Errors of a network over a validation set, with each image counted once in any number of processes."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from fastroute._defaults import CROP_PCT
from fastroute.data.augment import channel_statistics
from fastroute.data.decode import UnreadableImage
from fastroute.data.in_memory import DATASETS, Options
from fastroute.data.layout import choose
from fastroute.data.loaders import EpochLoader, MemoryLoader, StreamLoader
from fastroute.data.module import STREAMED, channels_of, imagenet_statistics
from fastroute.data.sources import Reading, val_source
from fastroute.data.transforms import eval_transform, resize_size
from fastroute.diagnostics.routing import RouterStatistics, across_processes, add_routing
from fastroute.models._shapes import like
from fastroute.nn import forward_with_routing
from fastroute.ops._instruction_set import warn_if_emulated
from fastroute.training.metrics import Totals


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: EpochLoader,
    *,
    device: torch.device | str = "cpu",
    amp_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
    routers: dict[str, RouterStatistics] | None = None,
) -> dict[str, float]:
    """Measure errors over all images of the loaders of all processes.

    Ten crops of an image, (N, 10, C, H, W), are classified by the mean of their ten softmax outputs.

    Args:
        model: a network from images to logits, on the device. It is set to evaluation mode.
        loader: batches of images and labels, as from `validation_loader`.
        device: the device of the model and of the images.
        amp_dtype: the autocast type; None computes in the network's own.
        memory_format: of the images.
        routers: filled with the statistics of each router by name, over all crops.

    Returns:
        "loss"; "error" (top-1) and "error5" (top-5), in percent; "images", their number; and "skipped", the number of
        images that could not be read.

    Raises:
        UnreadableImage: an image cannot be read, or with `on_bad_image="skip"`, none can.
        ValueError: the network has no logit for the class of an image.
    """
    model.eval()
    device = torch.device(device)
    totals = Totals().to(device)
    autocast = torch.autocast(device.type, amp_dtype) if amp_dtype else contextlib.nullcontext()
    warn_if_emulated(amp_dtype, device.type)

    def logits(images: Tensor) -> Tensor:
        images = images.to(like(model).dtype).contiguous(memory_format=memory_format)
        if routers is None:
            return model(images)
        scores, routing = forward_with_routing(model, images)
        add_routing(routers, routing)
        return scores

    for images, labels in loader:
        if len(labels) == 0:  # this process has no part of the last batch
            continue
        with autocast:
            crops = images.unbind(1) if images.dim() == 5 else (images,)
            each = torch.stack([logits(crop).float().log_softmax(1) for crop in crops])
        scores = (each.double().logsumexp(0) - math.log(len(crops))).float()
        if (largest := int(labels.max())) >= scores.shape[1]:
            raise ValueError(f"there are images of class {largest}, but the network has {scores.shape[1]} logits")
        totals.update(F.nll_loss(scores, labels), scores, labels)
    counts = torch.tensor([totals.samples, getattr(loader, "skipped", 0)], device=device)
    if dist.is_initialized():
        dist.all_reduce(counts)
    if routers is not None:
        routers.update(across_processes(routers))
    images, skipped = counts.tolist()
    if not images:
        raise UnreadableImage(f"none of the {skipped:,} images can be read" if skipped else "there are no images")
    result = {name: value.item() for name, value in totals.compute().items()}
    return result | {"images": images, "skipped": skipped}


def validation_loader(
    dataset: str,
    data_dir: Path | None,
    *,
    batch_size: int = 128,
    img_size: int | None = None,
    crop_pct: float = CROP_PCT,
    ten_crop: bool = False,
    num_workers: int = 1,
    first_classes: int | None = None,
    on_bad_image: str = "stop",
    mean: Tensor | None = None,
    std: Tensor | None = None,
    interpolation: str = "bilinear",
    in_chans: int | None = None,
    val_split: float = 0.0,
    split_seed: int = 0,
    input_key: str | None = None,
    classes: Sequence[str] | None = None,
    device: torch.device | str = "cpu",
) -> tuple[EpochLoader, list[str], int]:
    """Make a loader of this process's share of the validation images of a data set, for `evaluate`.

    Args:
        dataset, data_dir, batch_size, img_size, num_workers, first_classes, on_bad_image, interpolation, in_chans,
            input_key: see `ImageDataModule`; `val_source` says where images of "imagefolder" and "webdataset" are
            searched for.
        crop_pct: the side of the crop, as a share of the resized image's shorter side.
        ten_crop: whether to take the four corners, the centre, and their mirror images, instead of the centre alone.
        mean, std: (C,), in units of uint8 values; the default is ImageNet's for streamed images, and that of the
            training images for sets in memory.
        val_split, split_seed: select the images that a run with this `val_split` and `seed` set aside.
        classes: the names of the classes in the order of a run's class map; the default is their own order.
        device: of the images.

    Returns:
        the loader, the names of the classes, and the channels of the images.

    Raises:
        FileNotFoundError: there are no such images.
        ValueError: an argument is out of range or unknown, or ten crops are asked of a set in memory.
    """
    resize_size(img_size or 224, crop_pct)  # raises if they are out of range
    streamed = dataset in STREAMED
    if not streamed and dataset not in DATASETS:
        known = ", ".join(map(repr, dict.fromkeys((*DATASETS, *STREAMED))))
        raise ValueError(f"dataset is {dataset!r}; it must be one of {known}")
    if ten_crop and not streamed:
        raise ValueError(f"ten_crop is True; it is for {' and '.join(STREAMED)}, whose images are larger than a crop")
    if ten_crop and crop_pct >= 1:
        raise ValueError(
            f"ten_crop is True; crop_pct is {crop_pct}, and must be below 1 for crops to differ, such as 0.875"
        )
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    arguments = (batch_size, None, lambda: 0, rank, world_size, None)
    if streamed:
        if data_dir is None:
            raise ValueError(f"data_dir is None; the dataset {dataset!r} needs one")
        reading = Reading(first_classes, num_workers, val_split, split_seed, classes, input_key)
        source, channels = val_source(dataset, data_dir, reading), in_chans or 3
        found = imagenet_statistics(channels)
        mean, std = (levels.to(device) for levels in _levels(mean, std, found))
        transform = eval_transform(img_size or 224, crop_pct, ten_crop, interpolation)
        workers = {"num_workers": num_workers, "channels": channels, "on_bad_image": on_bad_image}
        return StreamLoader(source, transform, mean, std, *arguments, **workers), source.classes, channels
    options = Options(
        choose(data_dir, dataset, any_split=True).root if data_dir is not None and data_dir.exists() else data_dir,
        img_size,
        num_workers,
        first_classes=first_classes,
        val_split=val_split,
        seed=split_seed,
        interpolation=interpolation,
        in_chans=in_chans,
    )
    images = DATASETS[dataset](options)
    found = channel_statistics(images.train.images) if mean is None or std is None else (mean, std)
    tensors = (tensor.to(device) for tensor in (*images.val, *_levels(mean, std, found)))
    return MemoryLoader(*tensors, *arguments), images.classes, images.val.images.shape[-1]


def _levels(mean: Tensor | None, std: Tensor | None, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return channels_of("mean", mean, found[0]), channels_of("std", std, found[1])
