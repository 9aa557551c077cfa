"""Figures of routers (§3.5, Fig. 3.7 to 3.9 and 5.1)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastroute.diagnostics.statistics import DEAD, RouterStatistics
from fastroute.visualize.collect import Gate, Layer, RoutingData, short
from fastroute.visualize.style import (
    BLUE,
    INK,
    ORANGE,
    PALETTE,
    PAPER,
    RED,
    WIDTH,
    ShownFigure,
    grid,
    legible,
    show,
    styled,
)


@styled
def routing_flow(flows: Sequence[Sequence[Layer]], images: Tensor, titles: Sequence[str] | None = None) -> Figure:
    """Draw images side by side, each above its way through the routers (Fig. 3.7).

    A router is two rows of nodes, its incoming and outgoing tensors; the redder a node, the larger its share of the
    mean magnitude. An edge is a gate; the stronger the gate, the wider and bluer the edge. Grey edges are the layers
    between routers.

    Args:
        flows: from `collect_flows`.
        images: (N, C, H, W), values from 0 to 1.
        titles: a caption for each image, of one line or more.
    """
    depth = len(flows[0])
    figure = ShownFigure(figsize=(max(2.0, 1.5 * len(flows)), 1.8 + 0.95 * depth), layout="constrained")
    axes = figure.subplots(2, len(flows), squeeze=False, height_ratios=[1.4, 0.95 * depth])
    for column, (flow, image) in enumerate(zip(flows, images, strict=True)):
        show(axes[0, column], image)
        if titles is not None:
            text = "\n".join(legible(line, 18) for line in titles[column].split("\n"))
            axes[0, column].set_title(text, y=-0.02, va="top", pad=0)
        below = axes[1, column]
        below.set(xlim=(-0.75, 0.75), ylim=(-2 * depth + 0.5, 0.6))
        below.set_axis_off()
        for place, layer in enumerate(flow):
            _draw_layer(below, layer, 2 * place)
            if place + 1 < depth:
                for x in _places(layer.gates.shape[1]):
                    below.plot([x, x], [-2 * place - 1.2, -2 * place - 1.8], color=INK, alpha=0.25, linewidth=5)
            if column == 0:
                below.text(-0.72, -2 * place - 0.5, short(layer.name), rotation=90, va="center", ha="center")
    return figure


def _places(count: int) -> list[float]:
    return [0.0] if count == 1 else np.linspace(-0.45, 0.45, count).tolist()


_BEHIND = {"boxstyle": "round,pad=0.1", "facecolor": PAPER, "edgecolor": "none", "alpha": 0.7}


def _draw_layer(axes, layer: Layer, top: float) -> None:
    m, n = layer.gates.shape
    for i, x in enumerate(_places(m)):
        for j, y in enumerate(_places(n)):
            gate = layer.gates[i, j].item()
            axes.plot([x, y], [-top, -top - 1], color=BLUE, alpha=max(0.05, gate), linewidth=0.5 + 5 * gate, zorder=1)
            if m * n <= 4:  # the values of more edges would cover one another
                place = 0.36 if m > 1 else 0.5
                where = x + (y - x) * place, -top - place
                axes.text(*where, f"{gate:.2f}", fontsize=6, ha="center", va="center", bbox=_BEHIND, zorder=4)
    for row, (count, strengths) in enumerate(((m, layer.before), (n, layer.after))):
        for k, x in enumerate(_places(count)):
            share = 0.0 if strengths is None else min(1.0, strengths[k].item() * count / 2)
            style = {"markersize": 11, "marker": "s", "markeredgecolor": INK, "markeredgewidth": 0.6}
            axes.plot(x, -top - row, markerfacecolor="#f4f4f4", zorder=2, **style)
            axes.plot(x, -top - row, markerfacecolor=(RED, share), zorder=3, **style)


@styled
def gate_maximization(
    highest: Tensor,
    lowest: Tensor,
    synthesized: Tensor | None = None,
    title: str = "",
    captions: Sequence[Sequence[str]] | None = None,
) -> Figure:
    """Draw the images with the highest and the lowest value of a gate, and a synthesised one (Fig. 3.8).

    Args:
        highest, lowest: (N, C, H, W), values from 0 to 1, the most extreme first.
        synthesized: (C, H, W), values from 0 to 1, from `synthesize_gates`.
        title: such as the gate's name.
        captions: a caption of at most two lines for each of the highest and for each of the lowest images.
    """
    count = len(highest)
    wide = 0 if synthesized is None else 2.1
    size = WIDTH / (count + 1.1 + wide)
    below = 0.0 if captions is None else 0.5
    figure = ShownFigure(figsize=(WIDTH, 2 * size + 0.3 + below), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, hspace=0, wspace=0)
    spec = figure.add_gridspec(2, count + 2, width_ratios=[1.1, *[1] * count, max(wide, 0.01)])
    for row, (name, images) in enumerate((("highest", highest), ("lowest", lowest))):
        label = figure.add_subplot(spec[row, 0])
        label.set_axis_off()
        label.text(1, 0.5, name, ha="right", va="center", fontsize=8)
        for k, image in enumerate(images):
            place = figure.add_subplot(spec[row, k + 1])
            show(place, image)
            if captions is not None:
                text = "\n".join(legible(line, 9) for line in captions[row][k].split("\n"))
                place.set_title(text, y=-0.02, va="top", fontsize=5.5, pad=0)
    if synthesized is not None:
        place = figure.add_subplot(spec[:, -1])
        show(place, synthesized)
        place.set_title("made by ascent", fontsize=7)
    if title:
        figure.suptitle(title, fontsize=9)
    return figure


def variance_explained(values: Tensor, labels: Tensor) -> float:
    """Return the share of a gate's variance over images that lies between classes, less that of chance (ε²).

    The plain share, η², is (K − 1) / (N − 1) for noise, of N images of K classes.

    Args:
        values: (N,), the gate of each image.
        labels: (N,), int64.

    Example:
        >>> variance_explained(torch.tensor([0.1, 0.1, 0.9, 0.9]), torch.tensor([0, 0, 1, 1]))
        1.0
    """
    values = values.double()
    counts = torch.bincount(labels).double()
    means = torch.zeros_like(counts).index_add(0, labels, values) / counts.clamp(min=1)
    between = (counts * (means - values.mean()).square()).sum()
    total = (values - values.mean()).square().sum()
    return 0.0 if total < 1e-12 else _beyond_chance((between / total).item(), len(values), int((counts > 0).sum()))


def _beyond_chance(share: float, images: int, parameters: int) -> float:
    """Return a share of variance that is explained by a number of parameters, less what noise would give."""
    return max(0.0, 1 - (1 - share) * (images - 1) / (images - parameters)) if images > parameters else 0.0


def tint(colours: Tensor) -> str:
    """Return what the mean channels (N, C) of images measure: "colour", or "brightness" if all images are grey.

    The channels of grey images, each normalised in its own way, are linear functions of one another.
    """
    rank = torch.linalg.matrix_rank((colours - colours.mean(0)).double(), rtol=1e-4)
    return "brightness" if colours.shape[1] == 1 or rank == 1 else "colour"


def colour_explained(values: Tensor, colours: Tensor) -> float:
    """Return the share of a gate's variance that a linear function of the images' mean colours explains (adjusted R²).

    Args:
        values: (N,), the gate of each image.
        colours: (N, C), the mean of each channel.
    """
    values = (values - values.mean()).double()
    total = values.square().sum()
    if total < 1e-12:
        return 0.0
    x = torch.cat([colours, torch.ones(len(colours), 1)], 1).double()
    rest = values - x @ torch.linalg.lstsq(x, values[:, None], driver="gelsd").solution[:, 0]
    return _beyond_chance((1 - rest.square().sum() / total).item(), *x.shape)


def distinct_classes(values: Tensor, labels: Tensor, count: int = 4) -> list[int]:
    """Return the numbers of the classes with the highest and the lowest mean gate, half of each."""
    present = labels.unique().tolist()
    order = sorted(present, key=lambda label: values[labels == label].mean().item())
    if len(order) <= count:
        return sorted(order)
    return sorted(order[: count // 2] + order[len(order) - (count - count // 2) :])


def class_numbers(data: RoutingData, classes: Sequence[str], chosen: Sequence[str]) -> list[int]:
    """Return the numbers of the chosen classes.

    Raises:
        ValueError: a name is unknown, or there are no images of that class.
    """
    for name in chosen:
        if name not in classes:
            raise ValueError(f"classes names {name!r}; there is no such class: {', '.join(classes[:20])}")
        if not (data.labels == classes.index(name)).any():
            raise ValueError(f"classes names {name!r}, of which there are no images")
    return [classes.index(name) for name in chosen]


def most_distinct(data: RoutingData) -> list[Gate]:
    """Return the gate of each router that tells the classes apart best."""
    gates = []
    for name, values in data.gates.items():
        own = [Gate(name, i, j) for i in range(values.shape[1]) for j in range(values.shape[2])]
        gates.append(max(own, key=lambda gate: variance_explained(data.values(gate), data.labels)))
    return gates


@styled
def class_histograms(
    data: RoutingData, gates: Sequence[Gate], classes: Sequence[str], chosen: Sequence[str] | None = None
) -> Figure:
    """Draw histograms of gates over the images of a few classes (Fig. 3.9).

    Args:
        data: the gates of every image.
        gates: the gates to draw, one panel each.
        classes: the names of all classes, by their numbers.
        chosen: the names of the classes to show; by default the four of `distinct_classes` for each gate.

    Raises:
        ValueError: a chosen class does not exist, or has no images.
    """
    numbers = None if chosen is None else class_numbers(data, classes, chosen)
    figure, panels = grid(len(gates), 2, 1.9)
    for axes, gate in zip(panels, gates, strict=True):
        values = data.values(gate)
        low, high = values.min().item(), values.max().item()
        # Keep a gate that hardly varies near its one value, not spread over the panel.
        bins = np.linspace(*((low, high) if high - low > 0.02 else (low - 0.01, high + 0.01)), 31)
        for k, label in enumerate(numbers or distinct_classes(values, data.labels)):
            own = values[data.labels == label].numpy()
            colour, line = PALETTE[k % len(PALETTE)], ("-", "--", "-.", ":")[k % 4]
            weights = np.full(len(own), 100 / len(own))
            style = {"histtype": "stepfilled", "linewidth": 1.3, "linestyle": line, "edgecolor": colour}
            axes.hist(own, bins, weights=weights, facecolor=(colour, 0.15), label=legible(classes[label]), **style)
        axes.set(title=str(gate), ylabel="% of the class")
        axes.legend(handlelength=1.6)
    return figure


def one_per_vector(data: RoutingData, most: int = 16) -> list[Gate]:
    """Return the gate that varies most of each gating vector, or of `most` of the vectors."""
    return data.widest(min(most, sum(gates.shape[1] for gates in data.gates.values())))


@styled
def gate_context(data: RoutingData) -> Figure:
    """Draw how much of the gates' variance the images' mean colour and their class explain, by depth.

    Each gating vector is shown by the gate that varies most. The two shares may overlap, since classes have colours.

    Args:
        data: the gates of every image.
    """
    gates = one_per_vector(data)
    figure = ShownFigure(figsize=(WIDTH, 0.9 + 0.28 * len(gates)), layout="constrained")
    axes = figure.subplots()
    for shift, colour, marker, name, shares in (
        (
            -0.12,
            ORANGE,
            "s",
            f"mean {tint(data.colours)} (R²)",
            [colour_explained(data.values(g), data.colours) for g in gates],
        ),
        (0.12, BLUE, "o", "class (ε²)", [variance_explained(data.values(g), data.labels) for g in gates]),
    ):
        places = np.arange(len(gates)) + shift
        axes.hlines(places, 0, shares, color=colour, linewidth=2)
        axes.plot(shares, places, marker, color=colour, label=name, markersize=5)
    axes.set_yticks(range(len(gates)), list(map(str, gates)))
    axes.set(xlim=(0, 1), ylim=(len(gates) - 0.5, -0.5), xlabel="share of the gate's variance explained")
    axes.grid(axis="x")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return figure


def gate_remarks(statistics: RouterStatistics) -> list[list[str]]:
    """Return "dead", "skewed" or "" for each gate, as m lists of n texts.

    "skewed" marks the gate that takes at least half of its incoming path for every image. The other gates of that path
    are then never above 0.5, and get no remark.
    """
    dead, preferred = (statistics.peak < DEAD).tolist(), statistics.mean_gates.argmax(1).tolist()
    remarks = [["dead" if gate else "" for gate in row] for row in dead]
    takes_half = ((statistics.trough >= 0.5) & (statistics.trough.shape[1] > 1)).tolist()
    for row, j, always in zip(remarks, preferred, takes_half, strict=True):
        if always[j] and not (len(row) == 2 and "dead" in row):  # "dead" says it, too
            row[j] = "skewed"
    return remarks


@styled
def gate_health(after: RoutingData, before: RoutingData | None = None) -> Figure:
    """Draw each gate over all images: its mean, middle 80 % and range; dead and skewed gates are labelled.

    Args:
        after: the network's gates.
        before: the gates of another network with the same routers, such as one without regularisation (Fig. 5.1).

    Raises:
        ValueError: the routers of the two networks differ.
    """
    runs = [(after, BLUE, "o", "after" if before else "")]
    if before is not None:
        shapes = [{name: gates.shape[1:] for name, gates in data.gates.items()} for data in (after, before)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"before has the routers {list(before.gates)}; they must be those of the network, alike")
        runs.insert(0, (before, ORANGE, "s", "before"))
    gates = [Gate(name, i, j) for name, g in after.gates.items() for i in range(g.shape[1]) for j in range(g.shape[2])]
    figure = ShownFigure(figsize=(WIDTH, 0.8 + 0.2 * len(runs) * len(gates)), layout="constrained")
    axes = figure.subplots()
    step = 0.8 / len(runs)
    for k, (data, colour, marker, name) in enumerate(runs):
        places = np.arange(len(gates)) + (k - (len(runs) - 1) / 2) * step
        values = torch.stack([data.values(gate) for gate in gates]).numpy()
        low, p10, p90, high = np.quantile(values, [0, 0.1, 0.9, 1], axis=1)
        axes.hlines(places, low, high, color=colour, linewidth=1)
        axes.hlines(places, p10, p90, color=colour, linewidth=4, alpha=0.45)
        axes.plot(values.mean(1), places, marker, color=colour, markersize=4, label=name)
        statistics = data.statistics()
        for place, gate in zip(places, gates, strict=True):
            if remark := gate_remarks(statistics[gate.router])[gate.i][gate.j]:
                axes.text(1.02, place, remark, va="center", fontsize=8)
    axes.set_yticks(range(len(gates)), list(map(str, gates)))
    axes.set(xlim=(0, 1), ylim=(len(gates) - 0.4, -0.6), xlabel="gate: mean, middle 80 % and range over the images")
    axes.grid(axis="x")
    if before is not None:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return figure


def gate_rows(data: RoutingData) -> list[Mapping[str, str]]:
    """Return a table of the gating vectors, each a dict from column to text."""
    rows = []
    for name, statistics in data.statistics().items():
        remarks = gate_remarks(statistics)
        for i, means in enumerate(statistics.mean_gates.tolist()):
            found = [f"{remark} to {j + 1}" for j, remark in enumerate(remarks[i]) if remark]
            rows.append(
                {
                    "router": short(name),
                    "from": str(i + 1),
                    "mean gates": "  ".join(f"{mean:.2f}" for mean in means),
                    "largest, % of images": "  ".join(
                        f"{100 * w:.0f}" for w in statistics.shares_of_maximum[i].tolist()
                    ),
                    "entropy": f"{statistics.mean_entropy[i]:.2f}",
                    "remarks": ", ".join(found) or "–",
                }
            )
    return rows
