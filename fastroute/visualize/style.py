"""The style of all figures. Colours are Okabe and Ito's, which colour-blind readers can tell apart."""

import functools
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from fastroute._errors import printable
from fastroute._files import replacing, write_text

BLUE, RED, GREEN, ORANGE = "#0072b2", "#d55e00", "#009e73", "#e69f00"
PALETTE = (BLUE, RED, GREEN, ORANGE, "#56b4e9", "#cc79a7", "#8c8c8c", "#a6761d")
# The page replaces ink by the colour of its text and makes paper transparent, to suit a light and a dark theme.
INK, PAPER = "#1b1f24", "#fffffe"
WIDTH = 6.4
"""The width of a figure, in inches."""
LABEL = 40
"""The most characters of a name in a figure; longer names are cut."""
THUMBNAIL = 64
"""The largest height and width of a picture in a figure, in pixels."""

FLAT = 0.02
"""The standard deviation of an image's values, from 0 to 1, below which it counts as flat."""

_STYLE = {
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "legend.framealpha": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "font.size": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",  # text as text
    "text.parse_math": False,  # a class may be named `$`
}


class ShownFigure(Figure):
    """A figure that notebooks display with any matplotlib backend."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        with matplotlib.rc_context(_STYLE):
            self.savefig(png, format="png", dpi=110)
        return png.getvalue()


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Make a function draw in the style of all figures, whatever `matplotlib.rcParams` say."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        with matplotlib.rc_context(_STYLE):
            return draw(*args, **kwargs)

    return wrapper


def grid(count: int, columns: int, height: float, **options) -> tuple[Figure, list[Axes]]:
    """Return a figure of `count` axes in rows of `columns`, each row `height` inches, and the axes."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = ShownFigure(figsize=(WIDTH, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, list(axes[:count])


def legible(name: str, most: int = LABEL) -> str:
    """Return a name on one line, without unprintable characters, cut to `most` characters.

    A leading underscore gets a space before it, since matplotlib leaves names that begin with one out of legends.
    """
    name = printable(name)
    name = name if len(name) <= most else f"{name[: most - 1]}…"
    return f" {name}" if name.startswith("_") else name


def thumbnail(image: Tensor) -> np.ndarray:
    """Scale an image (C, H, W), values from 0 to 1, to at most `THUMBNAIL` pixels a side: uint8 (H, W, 3 or 1)."""
    if max(image.shape[1:]) > THUMBNAIL:
        scale = THUMBNAIL / max(image.shape[1:])
        size = [max(1, round(side * scale)) for side in image.shape[1:]]
        image = F.interpolate(image[None].float(), size=size, mode="area")[0]
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def is_flat(image: Tensor) -> bool:
    """Return whether an image, values from 0 to 1, has no contrast, since gradient ascent did not change it."""
    return image.std().item() < FLAT


def show(axes: Axes, image: Tensor) -> None:
    """Draw an image (C, H, W), values from 0 to 1, without axes."""
    axes.imshow(thumbnail(image), cmap="gray", vmin=0, vmax=255, interpolation="none")
    axes.set_axis_off()


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write `NAME.png` and `NAME.svg`, and return the SVG's text."""
    text = io.StringIO()
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):  # equal files for equal figures, and unique ids
        figure.savefig(text, format="svg", metadata={"Date": None})
        with replacing(folder / f"{name}.png", "wb") as file:
            figure.savefig(file, format="png", dpi=150)
    write_text(folder / f"{name}.svg", text.getvalue())
    return text.getvalue()
