"""Collect the data for figures: the gates of every image, and more about a few."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastroute.diagnostics.statistics import RouterStatistics
from fastroute.models._modes import modes_kept
from fastroute.nn import CrossConnection, ParallelPaths, Routing, forward_with_routing

Batches = Iterable[tuple[Tensor, Tensor]]
DIVERGED = "the network has diverged, so there is nothing to show: take a checkpoint from before"
NO_ROUTERS = "the network has no routers, so there is no routing to show; train one with parallel paths (--multipath)"


class Gate(NamedTuple):
    """The gate of a router that sends incoming path i to outgoing path j, both counted from 0."""

    router: str
    i: int
    j: int

    def __str__(self) -> str:
        """Return the thesis's notation, counted from 1: "stack1 g₂₁"."""
        subscripts = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
        return f"{short(self.router)} g{f'{self.i + 1}{self.j + 1}'.translate(subscripts)}"


def short(router: str) -> str:
    """Return the name of a router without the suffix "_router"."""
    return router.removesuffix("_router")


@dataclass(frozen=True)
class RoutingData:
    """The gates of every image, in the order of the images.

    Attributes:
        gates: router → (N, m, n), float32.
        labels: (N,), int64.
        colours: (N, C), the mean of each channel of the normalised image.
        predictions: (N,), the class with the highest logit; None if unknown.
    """

    gates: dict[str, Tensor]
    labels: Tensor
    colours: Tensor
    predictions: Tensor | None = None

    def __repr__(self) -> str:
        gates = ", ".join(f"{name} {'×'.join(map(str, values.shape[1:]))}" for name, values in self.gates.items())
        return f"RoutingData({len(self.labels):,} images; gates: {gates})"

    def values(self, gate: Gate) -> Tensor:
        """Return one gate for every image: (N,)."""
        return self.gates[gate.router][:, gate.i, gate.j]

    def extremes(self, gate: Gate, count: int = 10) -> tuple[Tensor, Tensor]:
        """Return the indices of the images with the highest and the lowest value of a gate, the most extreme first.

        Raises:
            ValueError: there are fewer images than `count`.
        """
        if not 1 <= count <= len(self.labels):
            raise ValueError(f"count is {count}; it must be 1 to {len(self.labels)}, the number of images")
        order = self.values(gate).argsort(descending=True, stable=True)
        return order[:count], order.flip(0)[:count]

    def statistics(self) -> dict[str, RouterStatistics]:
        """Return the statistics of each router over all images."""
        return {name: RouterStatistics.of(Routing(gates, gates)).cpu() for name, gates in self.gates.items()}

    def widest(self, count: int = 8) -> list[Gate]:
        """Return the gates that vary most from image to image, in the order of depth.

        There is one gate of each gating vector, since the others mirror it (§3.5.2). If there are more vectors than
        `count`, those evenly spaced in depth are taken; if there are fewer, the next best gates of each vector follow.
        """
        ranks: list[list[Gate]] = []
        choosing = {name: gates for name, gates in self.gates.items() if gates.shape[2] > 1}  # others' gates are 1
        for name, gates in (choosing or self.gates).items():
            for i, spread in enumerate(gates.std(0, correction=0)):
                for rank, j in enumerate(spread.argsort(descending=True, stable=True).tolist()):
                    ranks += [[]] * (rank == len(ranks))
                    ranks[rank] = [*ranks[rank], Gate(name, i, j)]
        if len(ranks[0]) > count:
            return [ranks[0][k] for k in torch.linspace(0, len(ranks[0]) - 1, count).round().int().tolist()]
        chosen = set([gate for rank in ranks for gate in rank][:count])
        depth = list(self.gates)
        return sorted(chosen, key=lambda gate: (depth.index(gate.router), gate.i, gate.j))


class Layer(NamedTuple):
    """Gates and magnitudes at one router, for one image.

    gates: (m, n).
    before: (m,), the share of each incoming tensor in their total mean magnitude.
    after: (n,), the same for the outgoing tensors. Both are None for a router without parallel tensors on that side.
    """

    name: str
    gates: Tensor
    before: Tensor | None
    after: Tensor | None


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode without gradients of its parameters, and restore both afterwards."""
    gradients = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with modes_kept(model):
            model.eval().requires_grad_(False)
            yield
    finally:
        for parameter, needed in gradients.items():
            parameter.requires_grad_(needed)


def matrix(values: Tensor) -> Tensor:
    """Return gates or scores as (N, m, n); a sparse router's, (N, n), have one incoming path."""
    return values if values.dim() == 3 else values[:, None]


@torch.no_grad()
def collect_routing(model: nn.Module, batches: Batches) -> RoutingData:
    """Collect gates, labels, predictions and mean colours in one pass over the images.

    Args:
        model: from images to logits, with routers; see `nn.forward_with_routing`.
        batches: images (N, C, H, W), on the model's device, and labels (N,).

    Returns:
        the gates of every image.

    Raises:
        ValueError: the model has no routers, or there are no images.

    Example:
        >>> network = fastroute.models.create_model("resnet20_cc2")
        >>> routing = collect_routing(network, [(images, labels)])
        >>> routing
        RoutingData(4 images; gates: stem_router 1×2, stack1_router 2×2, ...)
        >>> figure = gate_health(routing)
    """
    gates, labels, colours, predictions = {}, [], [], []
    with frozen(model):
        for images, targets in batches:
            logits, routing = forward_with_routing(model, images)
            if not routing:
                raise ValueError(NO_ROUTERS)
            for name, value in routing.items():
                gates.setdefault(name, []).append(matrix(value.gates).float().cpu())
            labels.append(targets.cpu())
            colours.append(images.mean((2, 3)).cpu())
            predictions.append(logits.argmax(1).cpu())
    if not labels:
        raise ValueError("batches are empty; there must be at least one image")
    joined = {name: torch.cat(parts) for name, parts in gates.items()}
    return RoutingData(joined, *(torch.cat(parts) for parts in (labels, colours, predictions)))


def check_gates(data: RoutingData) -> None:
    """Check that all gates are finite: others have no histogram and no order.

    Raises:
        ValueError: gates are non-finite; the message names the router.
    """
    for name, gates in data.gates.items():
        if wrong := int((~gates.isfinite().flatten(1).all(1)).sum()):
            raise ValueError(f"the gates of {name} are NaN or infinite for {wrong} of {len(gates)} images; {DIVERGED}")


@torch.no_grad()
def collect_flows(model: nn.Module, images: Tensor) -> list[list[Layer]]:
    """Collect the gates and magnitudes at every router for a few images, in the order of depth (Fig. 3.7).

    Args:
        model: as in `collect_routing`.
        images: (N, C, H, W), normalised, on the model's device.

    Returns:
        for each image, one `Layer` for each router.

    Raises:
        ValueError: the model has no routers.
    """
    strengths = {}

    def relative(tensors) -> Tensor | None:
        if not isinstance(tensors, list | tuple):
            return None
        means = torch.stack([x.abs().flatten(1).mean(1) for x in tensors], 1).float()  # [N, paths]
        return (means / means.sum(1, keepdim=True).clamp(min=1e-12)).cpu()

    with frozen(model), contextlib.ExitStack() as hooks:
        names = forward_with_routing(model, images[:1])[1]
        if not names:
            raise ValueError(NO_ROUTERS)
        modules = dict(model.named_modules())
        for name in names:

            def keep(module, args, output, name=name):
                xs = args[0]
                if isinstance(module, CrossConnection) and module.activation == "relu":
                    xs = [x.relu() for x in xs]  # the ReLU of the paths, which the router applies for them
                strengths.setdefault(name, (relative(xs), relative(output[0])))

            if name in modules:  # not a second call of a router
                hooks.callback(modules[name].register_forward_hook(keep).remove)
        routing = forward_with_routing(model, images)[1]
    flows = []
    for s in range(len(images)):
        layers = []
        for name, value in routing.items():
            before, after = (None if side is None else side[s] for side in strengths.get(name, (None, None)))
            layers.append(Layer(name, matrix(value.gates)[s].float().cpu(), before, after))
        flows.append(layers)
    return flows


def parallel_layers(model: nn.Module) -> dict[str, ParallelPaths]:
    """Return the parallel layers that have parameters, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ParallelPaths) and len(module) > 1 and next(module.parameters(), None) is not None
    }


def parallel_weights(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return the weights of each convolution and dense layer that all paths have, by the same name and of one shape.

    Args:
        model: a network with `ParallelPaths`.

    Returns:
        layer → one flat tensor for each path, float32, on the CPU.
    """
    weights = {}
    for layer, paths in parallel_layers(model).items():
        parameters = [dict(path.named_parameters()) for path in paths]
        for name, first in parameters[0].items():
            own = [path.get(name) for path in parameters]
            if first.dim() > 1 and all(w is not None and w.shape == first.shape for w in own):
                weights[f"{layer} {name.removesuffix('weight').rstrip('.')}".rstrip()] = [
                    w.detach().float().flatten().cpu() for w in own
                ]
    return weights


def weight_distance(a: Tensor, b: Tensor) -> float:
    """Return the Wasserstein-1 distance between two equally large sets of weights, in their joint standard deviations.

    It is 0 for equal histograms, whatever the order of the weights.

    Args:
        a, b: tensors with the same number of elements.

    Raises:
        ValueError: the numbers of elements differ.

    Example:
        >>> weights = torch.randn(1000)
        >>> weight_distance(weights, weights.flip(0))
        0.0
    """
    if a.numel() != b.numel():
        raise ValueError(f"a has {a.numel()} weights and b {b.numel()}; there must be as many in both")
    distance = (a.flatten().sort().values - b.flatten().sort().values).abs().mean()
    return (distance / torch.cat([a.flatten(), b.flatten()]).std(correction=0).clamp(min=1e-12)).item()


@torch.no_grad()
def path_similarity(model: nn.Module, batches: Batches) -> dict[str, Tensor]:
    """Compute the linear CKA between the feature maps of parallel paths, over minibatches.

    HSIC is estimated without bias in each batch and averaged (Nguyen et al., 2021). So no features are stored, and
    independent features come to about 0 in batches of any size.

    Args:
        model: a network.
        batches: as in `collect_routing`, with at least 4 images of mixed classes; smaller batches are left out.

    Returns:
        layer → (n, n), 1 for the same features. It is empty for a network without `ParallelPaths`.
    """
    hsic: dict[str, Tensor] = {}
    least: dict[str, Tensor] = {}  # below it, the HSIC of a path with itself is rounding
    with frozen(model), contextlib.ExitStack() as hooks:
        for name, layer in parallel_layers(model).items():

            def add(module, args, outputs, name=name):
                features = [x.flatten(1).float() for x in outputs]
                # HSIC does not depend on the mean, which may be many times larger than what differs between images.
                features = [x - x.mean(0) for x in features]
                grams = torch.stack([x @ x.T for x in features]).double().cpu()
                hsic[name] = hsic.get(name, 0) + _hsic(grams)
                least[name] = least.get(name, 0) + 1e-12 * grams.diagonal(dim1=1, dim2=2).mean(1).square()

            hooks.callback(layer.register_forward_hook(add).remove)
        for images, _ in batches:
            if len(images) >= 4:
                model(images)
    similarity = {}
    for name, h in hsic.items():
        own = h.diagonal().maximum(least[name]).clamp(min=torch.finfo(h.dtype).tiny).sqrt()
        similarity[name] = (h / own[:, None] / own).float()
    return similarity


def _hsic(grams: Tensor) -> Tensor:
    """Return the unbiased HSIC (Song et al., 2012) of each pair of Gram matrices (n, N, N): (n, n)."""
    count = grams.shape[1]
    grams = grams - torch.diag_embed(grams.diagonal(dim1=1, dim2=2))
    rows, totals = grams.sum(2), grams.sum((1, 2))
    products = torch.einsum("aij,bij->ab", grams, grams)
    products += totals[:, None] * totals / ((count - 1) * (count - 2))
    products -= 2 / (count - 2) * (rows @ rows.T)
    return products / (count * (count - 3))


@torch.no_grad()
def collect_responses(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Collect the responses of a clustering network before the softmax.

    Args:
        model: images (N, C, H, W) → responses (N, K).
        batches: images, on the model's device, and labels (N,).

    Returns:
        responses (N, K), float32, and labels (N,), on the CPU.
    """
    with frozen(model):
        parts = [(model(images).float().cpu(), labels.cpu()) for images, labels in batches]
    responses, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return responses, labels
