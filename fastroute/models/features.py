"""Return a network's pyramid of feature maps, for detectors and the like."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastroute.models._modes import modes_kept
from fastroute.models._shapes import like
from fastroute.nn._classifier import Classifies


def _reduction(size: int, of_map: int) -> int:
    """Return by which factor a map is smaller than the images: exact, or a power of two where sizes were rounded up."""
    return size // of_map if size % of_map == 0 else 2 ** round(math.log2(size / of_map))


class FeatureMaps(nn.Module):
    """Return the last map at each resolution of a network, as timm's `features_only`; parallel paths are averaged.

    Args:
        network: from `create_model` or `multipath`; it is changed: it loses its head.
        input_size: (channels, height, width) of the images by which the resolutions are found.
        out_indices: the maps to return, counted from the largest; None returns all.

    Attributes:
        info: a dict for each map that is returned: "num_chs", its channels; "reduction", the image's size by the map's;
            "module", the number of the layer that computes it.

    Shape:
        x: (N, in_chans, H, W).
        output: list of (N, num_chs, H / reduction, W / reduction), the largest first.

    Raises:
        ValueError: the network has no feature maps, or out_indices is out of range.
    """

    def __init__(
        self, network: nn.Module, input_size: Sequence[int] = (3, 224, 224), out_indices: Sequence[int] | None = None
    ):
        super().__init__()
        if not isinstance(network, Classifies):
            raise ValueError(f"network is a {type(network).__name__}; it has no layers whose maps can be taken")
        maps: list[list[Tensor]] = []
        with torch.no_grad(), modes_kept(network):
            images = like(network).new_zeros(1, *input_size)
            network.eval()._body(images, maps)
        last = {
            tuple(xs[0].shape[2:]): i
            for i, xs in enumerate(maps)
            if xs[0].dim() == 4 and xs[0].shape[2] > 1 and xs[0].shape != images.shape
        }
        places = list(last.values())
        indices = range(len(places)) if out_indices is None else out_indices
        if not places or not all(-len(places) <= i < len(places) for i in indices):
            raise ValueError(f"out_indices is {out_indices}; the network has maps of {len(places)} resolutions")
        self.places = [places[i] for i in indices]
        self.info = [
            {
                "num_chs": maps[i][0].shape[1],
                "reduction": _reduction(input_size[1], maps[i][0].shape[2]),
                "module": str(i),
            }
            for i in self.places
        ]
        network.reset_classifier(0, "")
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[list[Tensor]] = []
        self.network._body(x, maps)
        return [maps[i][0] if len(maps[i]) == 1 else torch.stack(maps[i]).mean(0) for i in self.places]
