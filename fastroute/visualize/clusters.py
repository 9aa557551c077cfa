"""Figures of a clustering network (§4.5.3, Fig. 4.7 to 4.9)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.manifold import TSNE
from torch import Tensor

from fastroute.visualize.style import INK, PALETTE, WIDTH, ShownFigure, grid, is_flat, legible, show, styled

LEGEND = 20
"""The most clusters in a legend."""


@styled
def response_map(responses: Mapping[str, Tensor], seed: int = 0, names: Sequence[str] | None = None) -> Figure:
    """Draw the t-SNE of responses before the softmax, coloured by cluster, with the clusters' numbers (Fig. 4.7).

    Args:
        responses: title → (N, K), such as of a random and of the trained network; N at least 10.
        seed: of t-SNE.
        names: the clusters' names for a legend, which is left out above `LEGEND` clusters.

    Example:
        >>> figure = response_map({"trained network": torch.randn(50, 4)}, names=["ant", "bee", "cat", "dog"])
    """
    figure, panels = grid(len(responses), 2, 3.1)
    for axes, (title, values) in zip(panels, responses.items(), strict=True):
        perplexity = min(30, (len(values) - 1) / 3)
        # One cluster has one component, and responses that are equal but for rounding have none.
        spread = (values.double() - values[0]).abs().max()
        init = "pca" if values.shape[1] > 1 and spread > 1e-5 * values.abs().max() else "random"
        places = TSNE(perplexity=perplexity, init=init, random_state=seed).fit_transform(values.numpy())
        clusters = values.argmax(1).numpy()
        for cluster in np.unique(clusters):
            own = places[clusters == cluster]
            axes.scatter(*own.T, s=4, color=PALETTE[cluster % len(PALETTE)], linewidths=0, rasterized=True)
            box = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": INK, "linewidth": 0.5}
            axes.text(*np.median(own, 0), str(cluster), ha="center", va="center", bbox=box, color="black", fontsize=7)
        axes.set(title=title, xticks=[], yticks=[])
    if names is not None and len(names) <= LEGEND:
        marks = [
            Line2D(
                [],
                [],
                marker="o",
                linestyle="",
                color=PALETTE[k % len(PALETTE)],
                label=f"{k}: {legible(name, 14)}".removesuffix(": "),
            )
            for k, name in enumerate(names)
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=min(5, len(names)), handletextpad=0.1)
    return figure


@styled
def cluster_images(highest: Mapping[str, Tensor], synthesized: Tensor | None = None) -> Figure:
    """Draw the images with the highest response of each cluster, and at the end a synthesised one (Fig. 4.8).

    Args:
        highest: a cluster's name → (N, C, H, W), values from 0 to 1.
        synthesized: (clusters, C, H, W), values from 0 to 1, from `synthesize_outputs`. Flat images are left out.
    """
    count = max(len(images) for images in highest.values())
    size = WIDTH / (count + 2.6)
    figure = ShownFigure(figsize=(WIDTH, size * 1.03 * len(highest)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.01, hspace=0, wspace=0)
    axes = figure.subplots(len(highest), count + 3, squeeze=False, width_ratios=[1.2, *[1] * count, 0.3, 1])
    labelled = False
    for row, (name, images) in enumerate(highest.items()):
        for unused in axes[row]:
            unused.set_axis_off()
        axes[row, 0].text(1, 0.5, name, ha="right", va="center", fontsize=8, transform=axes[row, 0].transAxes)
        for k, image in enumerate(images):
            show(axes[row, k + 1], image)
        if synthesized is not None and not is_flat(synthesized[row]):
            show(axes[row, -1], synthesized[row])
            if not labelled:
                axes[row, -1].set_title("made", fontsize=7)
                labelled = True
    return figure


@styled
def filter_images(layers: Mapping[str, Tensor]) -> Figure:
    """Draw what filters of the first and the last convolution respond to (Fig. 4.9).

    Args:
        layers: a layer's name → synthesised images (N, C, H, W), values from 0 to 1. Flat ones are left out.
    """
    layers = {name: [image for image in images if not is_flat(image)] for name, images in layers.items()}
    figure = ShownFigure(figsize=(WIDTH, 1.75 * len(layers)), layout="constrained")
    for part, (name, images) in zip(np.atleast_1d(figure.subfigures(len(layers))), layers.items(), strict=True):
        part.set_facecolor("none")
        part.suptitle(name, fontsize=9)
        if not images:
            part.text(0.5, 0.5, "all images stayed flat", ha="center", va="center", fontsize=8)
            continue
        columns = -(-len(images) // 2)
        axes = part.subplots(2, columns, squeeze=False).flatten()
        for place in axes:
            place.set_axis_off()
        for place, image in zip(axes, images, strict=False):
            show(place, image)
    return figure


@styled
def confusion(labels: Tensor, clusters: Tensor, classes: Sequence[str]) -> Figure:
    """Draw the share of each class (row, in %) in each cluster; clusters are in the order of their main class.

    Args:
        labels, clusters: (N,), int64.
        classes: the names of the classes.

    Example:
        >>> figure = confusion(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]), ["ant", "bee"])
    """
    counts = torch.zeros(len(classes), int(clusters.max()) + 1)
    counts.index_put_((labels, clusters), torch.ones(len(labels)), accumulate=True)
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    order = sorted(range(shares.shape[1]), key=lambda k: (counts[:, k].argmax().item(), -counts[:, k].max().item()))
    shares = shares[:, order].numpy()
    figure = ShownFigure(figsize=(WIDTH, 1 + 0.34 * len(classes)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="cividis", vmin=0, vmax=100, aspect="auto")
    for (i, j), value in np.ndenumerate(shares):
        if value >= 0.5:
            axes.text(
                j, i, f"{value:.0f}", ha="center", va="center", color="black" if value > 50 else "white", fontsize=8
            )
    axes.set_xticks(range(len(order)), [str(k) for k in order])
    axes.set_yticks(range(len(classes)), list(map(legible, classes)))
    axes.set(xlabel="cluster", ylabel="class")
    return figure
