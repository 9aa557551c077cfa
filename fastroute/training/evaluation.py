"""The error of a network over a validation set, each image counted once however many processes share the work."""

import contextlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from fastroute.data.augment import channel_statistics
from fastroute.data.in_memory import DATASETS, Options
from fastroute.data.loaders import EpochLoader, MemoryLoader, StreamLoader
from fastroute.data.module import IMAGENET_MEAN, IMAGENET_STD, STREAMED
from fastroute.data.sources import UnreadableImage, val_source
from fastroute.data.transforms import eval_transform, resize_size
from fastroute.diagnostics.routing import RouterStatistics, across_processes, add_routing
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
    """Error in percent over all images of the loader, of all processes.

    Ten crops of an image, (N, 10, C, H, W), are judged by the mean of their ten softmax outputs.

    Args:
        model: images to logits, on the device; it is put into evaluation.
        loader: batches of images and labels, such as `validation_loader`'s.
        device: where the model and the images are.
        amp_dtype: autocast to it.
        memory_format: of the images.
        routers: is given the statistics of each router by name, over all crops; the model must take `return_routing`.

    Returns:
        "loss", "error" (top-1), "error5" (top-5), "images" and "skipped", those that could not be read.

    Raises:
        UnreadableImage: an image cannot be read, or with `on_bad_image="skip"`, none can.
        ValueError: an image is of a class that the network has no logit for.
    """
    model.eval()
    device = torch.device(device)
    totals = Totals().to(device)
    autocast = torch.autocast(device.type, amp_dtype) if amp_dtype else contextlib.nullcontext()

    def logits(images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=memory_format)
        if routers is None:
            return model(images)
        scores, routing = model(images, return_routing=True)
        add_routing(routers, routing)
        return scores

    for images, labels in loader:
        if len(labels) == 0:  # this process has no share of the last images
            continue
        with autocast:
            crops = images.unbind(1) if images.dim() == 5 else (images,)
            shares = sum(logits(crop).float().softmax(1) for crop in crops)
        scores = (shares / len(crops)).log()
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
    crop_pct: float = 0.875,
    ten_crop: bool = False,
    num_workers: int = 1,
    first_classes: int | None = None,
    on_bad_image: str = "stop",
    mean: Tensor | None = None,
    std: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> tuple[EpochLoader, list[str], int]:
    """The validation images of a data set, this process's share of them, for `evaluate`.

    Args:
        dataset, data_dir, batch_size, img_size, num_workers, first_classes, on_bad_image: see `ImageDataModule`; for
            "imagefolder" and "webdataset", where images are looked for says `val_source`.
        crop_pct: the crop's side by the resized image's.
        ten_crop: the corners, the centre, and these mirrored, instead of the centre alone.
        mean, std: in units of the uint8 values; by default ImageNet's for images that are streamed, and those of the
            training images for sets in memory.
        device: for the images.

    Returns:
        the loader, the names of the classes, and the channels of the images.

    Raises:
        FileNotFoundError: there are no such images.
        ValueError: an argument is out of range or unknown, or ten crops are asked of a set in memory.
    """
    resize_size(img_size or 224, crop_pct)  # raises where they are out of range
    streamed = dataset in STREAMED
    if not streamed and dataset not in DATASETS:
        known = ", ".join(map(repr, dict.fromkeys((*DATASETS, *STREAMED))))
        raise ValueError(f"dataset is {dataset!r}; it must be one of {known}")
    if ten_crop and not streamed:
        raise ValueError(f"ten_crop is True; it is for {' and '.join(STREAMED)}, whose images are larger than a crop")
    if ten_crop and crop_pct >= 1:
        raise ValueError(f"ten_crop is True; crop_pct is {crop_pct}, and must be below 1 for crops to differ")
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    arguments = (batch_size, None, lambda: 0, rank, world_size, None)
    if streamed:
        if data_dir is None:
            raise ValueError(f"data_dir is None; the dataset {dataset!r} needs one")
        source = val_source(dataset, data_dir, first_classes, num_workers)
        statistics = (
            torch.tensor(default) if given is None else given
            for given, default in ((mean, IMAGENET_MEAN), (std, IMAGENET_STD))
        )
        mean, std = (value.to(device) for value in statistics)
        transform = eval_transform(img_size or 224, crop_pct, ten_crop)
        workers = {"num_workers": num_workers, "on_bad_image": on_bad_image}
        return StreamLoader(source, transform, mean, std, *arguments, **workers), source.classes, 3
    images = DATASETS[dataset](Options(data_dir, img_size, num_workers, first_classes=first_classes))
    if mean is None or std is None:
        mean, std = channel_statistics(images.train.images)
    tensors = (tensor.to(device) for tensor in (*images.val, mean, std))
    return MemoryLoader(*tensors, *arguments), images.classes, images.val.images.shape[-1]
