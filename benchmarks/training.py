"""Measure the overhead of the trainer and of the data pipeline, as ratios of interleaved rounds in one process.

Images/s of `fit` over those of a bare loop around the same step on prepared batches, with the share of time for which
`fit` waited for data in memory; and images/s of streamed images over those of torchvision's `ImageFolder` and
`DataLoader` with the same number of workers.

    python -m benchmarks.training DIR    # an image folder with train/ and val/
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fastroute.cli.memory import keep_freed_memory
from fastroute.data.in_memory import ImageSet, Split
from fastroute.data.module import IMAGENET_MEAN, IMAGENET_STD
from fastroute.training import ImageDataModule, RoutingClassifier, fit


class RandomImages(ImageDataModule):
    """Random images of CIFAR's shapes."""

    def setup(self, stage: str | None = None) -> None:
        train, val = (Split(torch.randint(256, (n, 32, 32, 3)).byte(), torch.randint(10, (n,))) for n in (1024, 128))
        self.images = ImageSet(train, val, [str(i) for i in range(10)], pad=4, flip=True)
        self.mean, self.std = torch.full((3,), 127.0), torch.full((3,), 74.0)
        self.classes, self.num_classes, self.img_size, self.in_chans = self.images.classes, 10, 32, 3


def bare_loop(module: RoutingClassifier, batches: list) -> float:
    """Return the images/s of a bare loop of forward, backward and SGD in bfloat16 autocast."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    module.train()
    start = time.perf_counter()
    for images, labels in batches:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sum(len(labels) for _, labels in batches) / (time.perf_counter() - start)


def trainer(model: str, rounds: int) -> tuple[list[float], list[float]]:
    """Return for each round the images/s of `fit` over the bare loop's, and the percentage of waiting for data."""
    data = RandomImages(batch_size=128)
    data.setup()
    batches = list(data.train_dataloader())
    ratios, waits = [], []
    for _ in range(rounds + 1):  # the first is warm-up
        module = RoutingClassifier(model, channels_last=True)
        bare = bare_loop(module, batches)
        with tempfile.TemporaryDirectory() as output:
            row = fit(
                module,
                data,
                epochs=1,
                output=output,
                amp_dtype="bfloat16",
                accelerator="cpu",
                console=Console(quiet=True),
            )[-1]
        after = bare_loop(module, batches)
        ratios.append(row["images_per_s"] / statistics.harmonic_mean([bare, after]))
        waits.append(row["data_wait"])
    return ratios[1:], waits[1:]


def streamed(folder: Path, workers: int, rounds: int) -> list[float]:
    """Return for each round the images/s of 256 → 224 crops over those of plain torchvision."""
    data = ImageDataModule(
        "imagefolder", folder, 64, 224, workers, in_memory=False, train_crop_mode="random", on_bad_image="stop"
    )
    data.setup()
    mean, std = ([value / 255 for value in values] for values in (IMAGENET_MEAN, IMAGENET_STD))
    to_float = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    transform = v2.Compose([v2.Resize(256), v2.RandomCrop(224), v2.RandomHorizontalFlip(), *to_float])
    plain = ImageFolder(folder / "train", transform)
    loaders = (
        data.train_dataloader(),
        DataLoader(plain, 64, shuffle=True, num_workers=workers, persistent_workers=True),
    )
    ratios = []
    for _ in range(rounds + 1):
        seconds = []
        for loader in loaders:
            start = time.perf_counter()
            assert sum(len(labels) for _, labels in loader) == len(plain)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    return ratios[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="resnet20_cc2")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    keep_freed_memory()
    ratios = streamed(options.folder, options.workers, options.rounds)
    print(f"streamed over torchvision: median {statistics.median(ratios):.2f}, rounds {[round(r, 2) for r in ratios]}")
    ratios, waits = trainer(options.model, options.rounds)
    print(f"fit over a bare loop: median {statistics.median(ratios):.3f}, rounds {[round(r, 3) for r in ratios]}")
    print(f"waiting for data: median {statistics.median(waits):.2f} %, rounds {[round(w, 2) for w in waits]}")


if __name__ == "__main__":
    main()
