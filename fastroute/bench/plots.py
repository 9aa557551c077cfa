"""Figures of a result: share of the copy's speed by size, step time by number of paths, and memory."""

import re
from collections.abc import Iterable
from pathlib import Path

from fastroute._extras import extra
from fastroute._files import replacing
from fastroute.bench.report import by_suite
from fastroute.bench.results import Result, Row

with extra("bench", "fastroute.bench.plots"):
    import matplotlib
    from matplotlib.figure import Figure

# Keep text as text, and make files reproducible.
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "fastroute", "axes.spines.top": False, "axes.spines.right": False}


def draw(result: Result, folder: Path, stem: str) -> list[Path]:
    """Write `STEM_share_of_copy.svg`, `STEM_steps.svg` and `STEM_memory.svg`, if the result has their cases.

    Args:
        result: a benchmark result.
        folder: where the files go.
        stem: prefix of the file names.

    Returns:
        The files written.
    """
    suites = by_suite(result.rows)
    operators = [row for row in suites.get("operators", []) if "copy" in row.ms]
    steps = [
        row
        for row in suites.get("networks", [])
        if "optimiser" in row.labels["direction"] and re.fullmatch(r"resnet20(_cc\d)?", row.labels["network"])
    ]
    memory = [row for row in operators if any(row.peak_bytes.values()) or any(row.saved_bytes.values())]
    figures = {"share_of_copy": (_share_of_copy, operators), "steps": (_steps, steps), "memory": (_memory, memory)}
    written = []
    with matplotlib.rc_context(_STYLE):
        for name, (figure, rows) in figures.items():
            if rows:
                written.append(folder / f"{stem}_{name}.svg")
                with replacing(written[-1], encoding="utf-8") as file:
                    figure(rows).savefig(file, format="svg", metadata={"Date": None})
    return written


def _lines(rows: Iterable[Row], *labels: str) -> dict[str, list[Row]]:
    lines = {}
    for row in rows:
        lines.setdefault(", ".join(str(row.labels[name]) for name in labels), []).append(row)
    return lines


def _axes(x: str, y: str):
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _share_of_copy(rows: list[Row]) -> Figure:
    figure, axes = _axes("bytes that must move (MB)", "share of the copy's speed")
    for name, line in _lines(rows, "operator", "direction", "backend", "dtype", "layout").items():
        line = sorted(line, key=lambda row: row.floor_bytes)
        axes.plot([r.floor_bytes / 1e6 for r in line], [r.times_as_fast_as("copy") for r in line], "o-", label=name)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.legend(fontsize="x-small")
    return figure


def _steps(rows: list[Row]) -> Figure:
    figure, axes = _axes("paths", "training step (ms)")
    for name, line in _lines(rows, "dtype", "layout", "batch").items():
        for contender in dict.fromkeys(contender for row in line for contender in row.ms):
            points = sorted((row.labels["paths"], row.ms[contender]) for row in line if contender in row.ms)
            axes.plot(*zip(*points, strict=True), "o-", label=f"{contender}: {name}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="x-small")
    return figure


def _memory(rows: list[Row]) -> Figure:
    """Plot peak memory, or memory saved for backward where the peak is unknown, over the minimal bytes moved."""
    kind = "peak_bytes" if any(any(row.peak_bytes.values()) for row in rows) else "saved_bytes"
    what = "at the peak" if kind == "peak_bytes" else "saved for backward"
    figure, axes = _axes("bytes that must move (MB)", f"memory {what} (MB)")
    for name, line in _lines(rows, "operator", "dtype").items():
        line = sorted((row for row in line if any(getattr(row, kind).values())), key=lambda row: row.floor_bytes)
        for contender in dict.fromkeys(contender for row in line for contender in getattr(row, kind)):
            found = ((row.floor_bytes, getattr(row, kind).get(contender)) for row in line)
            points = [(floor / 1e6, count / 1e6) for floor, count in found if count is not None]
            axes.plot(*zip(*points, strict=True), "o", label=f"{contender}: {name}", markersize=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.legend(fontsize="x-small")
    return figure
