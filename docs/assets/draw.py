"""Draw the picture of the front page, on light and dark paper: digits on their way through the network of `make demo`.

python docs/assets/draw.py runs/demo/resnet20_cc2/best.ckpt
"""

import sys
import tempfile
from pathlib import Path

import torch

from fastroute.data import ImageDataModule
from fastroute.training import RoutingClassifier
from fastroute.visualize import Gate, collect_flows, collect_routing, routing_flow
from fastroute.visualize.style import BLUE, INK, PAPER, save

SHOWN = 3
"""The images from each end of the gate that varies most."""
THEMES = {
    "light": {INK: "#1f2328", PAPER: "none"},
    "dark": {INK: "#e6edf3", PAPER: "none", BLUE: "#58a6ff"},
}
"""What the figure's colours become; the inks are those of GitHub's text."""


def main(checkpoint: Path, folder: Path) -> None:
    model = RoutingClassifier.load_from_checkpoint(checkpoint, map_location="cpu").model
    data = ImageDataModule("digits")
    data.setup()
    batches = list(data.val_dataloader())
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    routing = collect_routing(model, batches)
    gates = [Gate(name, i, 0) for name, g in routing.gates.items() for i in range(g.shape[1])]
    gate = max(gates, key=lambda gate: float(routing.values(gate).std()))
    high, low = routing.extremes(gate, SHOWN)
    chosen = torch.cat([high, low.flip(0)])
    images, titles = images[chosen], [f"{label}" for label in labels[chosen].tolist()]
    pixels = (images - images.amin()) / (images.amax() - images.amin())
    figure = routing_flow(collect_flows(model, images), pixels, titles)
    with tempfile.TemporaryDirectory() as scratch:
        drawn = save(figure, Path(scratch), "routing")
    for theme, colours in THEMES.items():
        svg = drawn
        for colour, replacement in colours.items():
            svg = svg.replace(colour, replacement)
        (folder / f"routing-{theme}.svg").write_text(svg, encoding="utf-8")
    print(f"{gate}: {routing.values(gate)[chosen].tolist()}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent)
