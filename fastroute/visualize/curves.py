"""Figures of training runs, from their summaries (Fig. 3.6 and 4.6)."""

import csv
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from fastroute._errors import in_a_line
from fastroute.visualize.style import PALETTE, WIDTH, ShownFigure, legible, styled

# Column of a summary.csv → the axis it is drawn on.
_CURVES = {
    "val_error": "error %",
    "train_error": "error %",
    "acc": "agreement with the labels",
    "nmi": "agreement with the labels",
    "entropy": "entropy of the posteriors",
}


def read_summary(path: Path) -> list[dict[str, str]]:
    """Read the rows of a `summary.csv`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no rows, or none of the columns that are drawn.
    """
    if not path.is_file():
        raise FileNotFoundError(f"summary is {path}; there is no such file")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            int(row.get("epoch", 1))
            for column in filter(row.get, _CURVES):
                float(row[column])
    except (csv.Error, TypeError, ValueError) as error:
        raise ValueError(f"summary is {path}; it is no table of numbers: {in_a_line(error)}") from None
    if not rows or not _CURVES.keys() & rows[0].keys():
        raise ValueError(f"summary is {path}; it must have rows with a column of {', '.join(_CURVES)}")
    return rows


@styled
def learning_curves(summaries: Mapping[str, Path]) -> Figure:
    """Draw the error, or a clustering's accuracy and mutual information, by epoch (Fig. 4.6).

    Several runs differ in colour, and the two curves of each in their line; of one run, the curves differ in both.

    Args:
        summaries: a run's name → its `summary.csv`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file has no rows, or none of the columns that are drawn.
    """
    figure = ShownFigure(figsize=(WIDTH, 2.8), layout="constrained")
    axes = figure.subplots()
    for k, (name, path) in enumerate(summaries.items()):
        rows = read_summary(path)
        columns = [column for column in _CURVES if column in rows[0]]
        for shown, (line, column) in enumerate(zip(("-", "--"), columns, strict=False)):
            points = [(int(row.get("epoch", 1)), float(row[column])) for row in rows if row.get(column)]
            text = f"{legible(name)} {column}" if len(summaries) > 1 else column
            colour = PALETTE[(k if len(summaries) > 1 else shown) % len(PALETTE)]
            axes.plot([x for x, _ in points], [y for _, y in points], line, color=colour, label=text, marker=".")
            axes.set_ylabel(_CURVES[column])
    axes.set(xlabel="epoch")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid()
    axes.legend()
    return figure


@styled
def accuracy_against_parameters(runs: Mapping[str, tuple[int, float]]) -> Figure:
    """Draw the accuracy of networks by their size (Fig. 3.6).

    Args:
        runs: a network's name → its number of parameters, and its accuracy in percent.

    Example:
        >>> figure = accuracy_against_parameters({"resnet20": (270_000, 91.0), "resnet20_cc2": (550_000, 92.0)})
    """
    figure = ShownFigure(figsize=(WIDTH, 3), layout="constrained")
    axes = figure.subplots()
    for name, (parameters, accuracy) in runs.items():
        kind = next((k for k, mark in enumerate(("_cc", "_cp")) if mark in name), 2)
        colour, marker = ((PALETTE[1], "o"), (PALETTE[2], "s"), (PALETTE[0], "^"))[kind]
        axes.plot(parameters / 1e6, accuracy, marker, color=colour)
        axes.annotate(
            legible(name), (parameters / 1e6, accuracy), xytext=(5, 3), textcoords="offset points", fontsize=8
        )
    axes.margins(x=0.2, y=0.15)
    axes.set(xlabel="parameters (millions)", ylabel="accuracy %")
    axes.grid()
    return figure
