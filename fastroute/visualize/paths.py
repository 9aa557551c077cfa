"""Figures of parallel paths: their weights (Fig. 3.10) and the similarity of their features."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from fastroute.visualize.collect import weight_distance
from fastroute.visualize.style import PALETTE, grid, styled


def mean_distance(weights: Sequence[Tensor]) -> float:
    """Return the mean `weight_distance` over all pairs of paths."""
    distances = [weight_distance(a, b) for a, b in itertools.combinations(weights, 2)]
    return sum(distances) / len(distances)


@styled
def weight_histograms(weights: Mapping[str, Sequence[Tensor]]) -> Figure:
    """Draw histograms of the paths' weights in some layers, with the distance between them (Fig. 3.10).

    Args:
        weights: layer → one tensor for each path, as from `parallel_weights`.

    Example:
        >>> figure = weight_histograms({"conv": [torch.randn(100), torch.randn(100)]})
    """
    figure, panels = grid(len(weights), 3, 1.7)
    for axes, (name, paths) in zip(panels, weights.items(), strict=True):
        reach = max(np.quantile(w.abs().numpy(), 0.995) for w in paths)
        bins = np.linspace(-reach, reach, 41)
        for k, w in enumerate(paths):
            colour, line = PALETTE[k % len(PALETTE)], ("-", "--", "-.", ":")[k % 4]
            style = {"histtype": "stepfilled", "linewidth": 1.2, "linestyle": line, "edgecolor": colour}
            axes.hist(w.numpy(), bins, density=True, facecolor=(colour, 0.15), label=f"path {k + 1}", **style)
        axes.set_title(f"{name}\ndistance {mean_distance(paths):.3f} σ", fontsize=8)
        axes.set_yticks([])
    panels[0].legend(handlelength=1.6)
    return figure


@styled
def similarity_matrices(similarity: Mapping[str, Tensor]) -> Figure:
    """Draw the linear CKA between parallel feature maps, layer by layer: 1 where paths have collapsed into one.

    Args:
        similarity: layer → (n, n), as from `path_similarity`.

    Example:
        >>> figure = similarity_matrices({"conv": torch.tensor([[1.0, 0.3], [0.3, 1.0]])})
    """
    figure, panels = grid(len(similarity), 4, 1.8)
    for axes, (name, cka) in zip(panels, similarity.items(), strict=True):
        image = axes.imshow(cka.numpy(), cmap="cividis", vmin=0, vmax=1)
        for (i, j), value in np.ndenumerate(cka.numpy()):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.5 else "white")
        ticks = range(len(cka))
        axes.set_xticks(ticks, [str(k + 1) for k in ticks])
        axes.set_yticks(ticks, [str(k + 1) for k in ticks])
        axes.set(title=name, xlabel="path", ylabel="path")
    figure.colorbar(image, ax=panels, label="CKA", shrink=0.8, pad=0.02)
    return figure
