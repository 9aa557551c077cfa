"""Draw the pictures of the front page: how digits flow through a trained network, on light and on dark paper.

    python docs/assets/draw.py runs/demo/resnet20_cc2/best.ckpt

The checkpoint is one of `fastroute train` or `fastroute demo` on the digits.
"""

import re
import sys
import tempfile
from pathlib import Path

import torch

from fastroute.data import ImageDataModule
from fastroute.training import RoutingClassifier
from fastroute.visualize import collect_flows, routing_flow
from fastroute.visualize.style import INK, PAPER, save

DIGITS = (0, 1, 3, 4, 7, 8)
THEMES = {"light": ("#1f2328", "none"), "dark": ("#e6edf3", "none")}  # ink and paper; GitHub's text colours


def main(checkpoint: Path, folder: Path) -> None:
    model = RoutingClassifier.load_from_checkpoint(checkpoint, map_location="cpu").model
    data = ImageDataModule("digits")
    data.setup()
    images, labels = next(iter(data.val_dataloader()))
    first = [int((labels == digit).nonzero()[0]) for digit in DIGITS]
    images = images[first]
    low, high = images.amin(), images.amax()
    figure = routing_flow(collect_flows(model, images), (images - low) / (high - low), [f"{d}" for d in DIGITS])
    with tempfile.TemporaryDirectory() as scratch:
        drawn = save(figure, Path(scratch), "routing")
    for theme, (ink, paper) in THEMES.items():
        svg = re.sub(INK, ink, re.sub(PAPER, paper, drawn))
        (folder / f"routing-{theme}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]), Path(__file__).parent)
