"""Join the digits of scikit-learn, MNIST and CIFAR-10 to one set of 20 classes, and see which gates follow the domain.

    python examples/domains.py join FOLDER --mnist data --cifar10 data
    fastroute train resnet20_cc2 --data-dir FOLDER --img-size 32 --epochs 12 --sched onecycle --experiment domains
    fastroute predict runs/domains/last.ckpt FOLDER/val --gates --format csv --output gates.csv
    python examples/domains.py gates gates.csv

The two sets of digits share their classes, so only the way in which they are drawn tells their images apart.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from fastroute.clustering.images import load_images

SIDE, MOST, VALIDATION = 32, 5000, 5
"""Height and width; the most images of a domain; every fifth is for validation."""


def join(folder: Path, mnist: Path, cifar10: Path) -> None:
    """Write FOLDER/train and FOLDER/val, with a subfolder for each class, and files named by their domain.

    Args:
        folder: new, or with images that may be replaced.
        mnist: with torchvision's MNIST/raw.
        cifar10: with torchvision's cifar-10-batches-py, or with train/ of images in folders of their classes.
    """
    source = "imagefolder" if (cifar10 / "train").is_dir() else "cifar10"
    for domain, dataset, place in (("digits", "digits", None), ("mnist", "mnist", mnist), ("cifar10", source, cifar10)):
        loaded = load_images(dataset, place, img_size=SIDE)
        order = torch.randperm(len(loaded.images), generator=torch.Generator().manual_seed(0))[:MOST]
        for number, i in enumerate(order.tolist()):
            part = "val" if number % VALIDATION == 0 else "train"
            place = folder / part / str(loaded.classes[loaded.labels[i]])
            place.mkdir(parents=True, exist_ok=True)
            to_pil_image(loaded.images[i].expand(3, -1, -1)).save(place / f"{domain}-{number:04}.png")
        print(f"{domain}: {len(order):,} images of {len(loaded.classes)} classes")


def share_explained(values: Tensor, groups: Sequence[str]) -> float:
    """Return the share of the variance of values (N,) that lies between their groups, from 0 to 1."""
    total = values.var(correction=0)
    means = values.clone()
    for group in set(groups):
        members = torch.tensor([own == group for own in groups])
        means[members] = values[members].mean()
    return (means.var(correction=0) / total).item() if total > 0 else 0.0


def gates(file: Path) -> dict[str, tuple[float, float]]:
    """Print a table of `fastroute predict --gates`: each gate's mean by domain, and what explains its variance.

    Returns:
        the shares of the variance between domains and between classes, by the name of the gate.
    """
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    domains = [Path(row["path"]).name.partition("-")[0] for row in rows]
    classes = [Path(row["path"]).parent.name for row in rows]
    names = sorted(set(domains), key=domains.index)
    shares = {}
    print(f"{'gate':20}", *(f"{name:>8}" for name in names), "  domain   class")
    for gate in [name for name in rows[0] if "_g" in name and name.rpartition("_g")[2].isdigit()]:
        values = torch.tensor([float(row[gate]) for row in rows])
        shares[gate] = share_explained(values, domains), share_explained(values, classes)
        means = [values[[i for i, own in enumerate(domains) if own == name]].mean() for name in names]
        print(f"{gate:20}", *(f"{mean:8.2f}" for mean in means), *(f"{share:8.2f}" for share in shares[gate]))
    wrong = [row["class_1"] != own for row, own in zip(rows, classes, strict=True)]
    for name in names:
        own = [miss for miss, domain in zip(wrong, domains, strict=True) if domain == name]
        print(f"{name}: {100 * sum(own) / len(own):.2f} % error of {len(own):,} images")
    return shares


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    joins = commands.add_parser("join", help="write the joined images")
    joins.add_argument("folder", type=Path)
    joins.add_argument("--mnist", type=Path, required=True, help="folder with MNIST/raw")
    joins.add_argument("--cifar10", type=Path, required=True, help="CIFAR-10, by torchvision or in folders")
    reads = commands.add_parser("gates", help="read the gates of a network trained on them")
    reads.add_argument("file", type=Path, help="of `fastroute predict --gates --format csv`")
    options = parser.parse_args(arguments)
    if options.command == "join":
        join(options.folder, options.mnist, options.cifar10)
    else:
        gates(options.file)


if __name__ == "__main__":
    main()
