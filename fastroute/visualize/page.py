"""The page of a report: its images, its sections, and the file that holds all of them."""

import base64
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fastroute._files import check_writable, write_text
from fastroute.visualize.collect import Layer, short
from fastroute.visualize.style import INK, PAPER, save, thumbnail


@dataclass(frozen=True)
class Images:
    """The images of a report.

    Attributes:
        batches: returns one pass over normalised images (N, C, H, W) and labels (N,), on the network's device.
        pixels: indices (k,) in the order of that pass → unnormalised images, uint8 (k, H, W, C).
        classes: the names of the labels.
        mean, std: (C,), of the normalisation, for values from 0 to 1.
    """

    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    pixels: Callable[[Tensor], Tensor]
    classes: Sequence[str]
    mean: Tensor
    std: Tensor

    def at(self, indices: Tensor) -> Tensor:
        """Return the images of these indices: (k, C, H, W), values from 0 to 1."""
        return self.pixels(indices).permute(0, 3, 1, 2).float() / 255

    def normalized(self, images: Tensor) -> Tensor:
        """Normalise images (k, C, H, W), values from 0 to 1, on the device of `mean`."""
        mean, std = self.mean.view(-1, 1, 1), self.std.view(-1, 1, 1)
        return (images.to(mean.device) - mean) / std


@dataclass
class Report:
    """Collect the sections of a page; each figure is written when it is added.

    Args:
        folder: receives `report.html`, and each figure as PNG and SVG.
        title: the page's title.
        facts: name → value, about the network and the images.
        progress: called with the title of each section, and the name of each long step, as it begins.
        verdict: a sentence or two at the top.
    """

    folder: Path
    title: str
    facts: Mapping[str, str]
    progress: Callable[[str], None] = field(default=lambda title: None, repr=False)
    verdict: str = ""
    sections: list[dict] = field(default_factory=list)

    def __post_init__(self):
        self.folder = Path(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        check_writable(self.folder / "report.html", "output")

    def section(self, title: str, text: str, **content) -> None:
        """Begin a section.

        Args:
            title: the heading.
            text: a paragraph below it.
            content: `table`, a list of dicts of text, or `flow`, from `flow_data`.
        """
        self.progress(title)
        self.sections.append({"title": title, "text": text, "figures": [], **content})

    def figure(self, name: str, figure: Figure, description: str) -> None:
        """Add a figure to the last section.

        Args:
            name: of its files.
            figure: the figure.
            description: read to those who cannot see the figure.
        """
        svg = save(figure, self.folder, name)
        svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(PAPER, "transparent")
        width = round(figure.get_size_inches()[0] * 96)
        svg = svg.replace("<svg", '<svg aria-hidden="true"', 1)
        self.sections[-1]["figures"].append({"name": name, "svg": svg, "description": description, "width": width})

    def write(self) -> Path:
        """Write the page, and return its path."""
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("fastroute.visualize"), autoescape=True, undefined=jinja2.StrictUndefined
        )
        page = environment.get_template("report.html").render(
            title=self.title, verdict=self.verdict, facts=self.facts, sections=self.sections
        )
        path = self.folder / "report.html"
        write_text(path, page, errors="backslashreplace")  # file names may be no valid text
        return path


def data_uri(image: Tensor) -> str:
    """Encode an image (C, H, W), values from 0 to 1, as a PNG in a data URI."""
    pixels, file = thumbnail(image), io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def flow_data(flows: Sequence[Sequence[Layer]], images: Tensor, titles: Sequence[str]) -> list[dict]:
    """Return the data from which the page's script draws the routing flow."""

    def rounded(values: Tensor | None) -> list | None:
        return None if values is None else values.double().round(decimals=4).tolist()

    return [
        {
            "title": title,
            "picture": data_uri(image),
            "layers": [
                {
                    "name": short(layer.name),
                    "gates": rounded(layer.gates),
                    "before": rounded(layer.before),
                    "after": rounded(layer.after),
                }
                for layer in flow
            ],
        }
        for flow, image, title in zip(flows, images, titles, strict=True)
    ]
