"""Reports: all figures of a network on one self-contained page."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastroute._extras import extra
from fastroute.visualize import clusters, curves, paths, routing
from fastroute.visualize.collect import (
    DIVERGED,
    RoutingData,
    check_gates,
    collect_flows,
    collect_responses,
    collect_routing,
    frozen,
    parallel_weights,
    path_similarity,
    short,
)
from fastroute.visualize.page import Images, Report, flow_data
from fastroute.visualize.style import is_flat, legible
from fastroute.visualize.synthesis import synthesize_filters, synthesize_gates, synthesize_outputs

EXTREMES = 10
"""The number of images shown for each end of a gate (Fig. 3.8)."""
SIMILARITY_IMAGES = 512
COLLAPSED, EVEN, FOLLOWS, MOST_PATHS = 0.95, 0.01, 0.2, 64
"""Thresholds of the verdict: the CKA above which paths have collapsed, the standard deviation below which a gate is the
same for all images, the share of a gate's variance that class or colour must explain, and the most paths compared."""
RESPONSES = 2560
"""The number of images in a map of responses, as in Fig. 4.7."""


def routing_report(
    report: Report,
    model: nn.Module,
    images: Images,
    *,
    chosen: tuple[Tensor, Sequence[str]] | None = None,
    before: nn.Module | None = None,
    classes: Sequence[str] | None = None,
    gates: int = 8,
    summaries: Mapping[str, Path] | None = None,
    runs: Mapping[str, tuple[int, float]] | None = None,
) -> Path:
    """Write the page of a network with routers.

    Args:
        report: an empty report.
        model: from images to logits, with routers; see `nn.forward_with_routing`.
        images: the images.
        chosen: images (k, C, H, W), values from 0 to 1, and their names, for the routing flow; by default twelve of
            `images`.
        before: a network to compare gates with, such as the same without regularisation.
        classes: the classes of the histograms; by default the most distinct for each gate.
        gates: the most gates to maximise.
        summaries: as in `learning_curves`.
        runs: as in `accuracy_against_parameters`.

    Returns:
        the path of the page.

    Raises:
        ValueError: the network has no routers, gates are non-finite, there are fewer images than each gate shows, or a
            class does not exist.
    """
    report.progress("Gates of all images")
    data = collect_routing(model, images.batches())
    check_gates(data)
    count = len(data.labels)
    if count < 2 * EXTREMES:
        raise ValueError(f"there are {count} images; a report shows {2 * EXTREMES} for each gate, and needs as many")
    if classes is not None:
        routing.class_numbers(data, images.classes, classes)

    report.progress("Features of the paths")
    similarity = _similarity(model, images, count)
    error = 100 * (data.predictions != data.labels).double().mean().item()
    report.facts = {**report.facts, "accuracy": f"{100 - error:.2f} % of these images"}
    report.verdict = verdict(data, similarity)

    def wrong(label: int, prediction: int) -> list[str]:
        return [] if prediction == label else [_class(images, prediction)]

    if chosen is None:
        indices = torch.linspace(0, count - 1, 12).round().long()
        pairs = zip(data.labels[indices].tolist(), data.predictions[indices].tolist(), strict=True)
        pictures, captions = images.at(indices), [[images.classes[pair[0]], *wrong(*pair)] for pair in pairs]
    else:
        pictures, names = chosen
        with torch.no_grad(), frozen(model):
            found = model(images.normalized(pictures)).argmax(1).tolist()
        captions = [[name, _class(images, k)] for name, k in zip(names, found, strict=True)]
    titles = [" → ".join(caption) for caption in captions]
    flows = collect_flows(model, images.normalized(pictures))
    report.section(
        "Routing flow",
        "Each router is two rows of nodes: the parallel tensors that enter it and those that leave it. The redder a "
        "node, the larger its tensor's share of the mean magnitude of all; the wider and bluer an edge, the stronger "
        "the gate. The gate g_ij is the share of incoming path i that goes to outgoing path j; over j they sum to 1, "
        'and to less in sparse routers with gates="softmax". '
        + (
            "An arrow points from the class of an image to the one that the network took it for, where that is wrong."
            if chosen is None
            else "An arrow points from the name of an image to the class that the network took it for."
        ),
        flow=flow_data(flows, pictures, titles),
    )
    report.figure(
        "routing_flow",
        routing.routing_flow(flows[:4], pictures[:4], ["\n→ ".join(caption) for caption in captions[:4]]),
        f"Routing flow of {', '.join(titles[:4])} side by side.",
    )

    tint = routing.tint(data.colours)
    report.section(
        "What gates follow",
        f"How much of a gate's variance over the images their mean {tint} explains, and how much their class. A gate "
        f"that follows {tint} more than class answers to something shallow.",
    )
    shares = "; ".join(
        f"{gate}: {tint} {routing.colour_explained(data.values(gate), data.colours):.0%}, "
        f"class {routing.variance_explained(data.values(gate), data.labels):.0%}"
        for gate in routing.one_per_vector(data)
    )
    report.figure("gate_context", routing.gate_context(data), f"Variance of gates explained. {shares}.")

    widest = data.widest(gates)
    channels, height, width = images.at(torch.tensor([0])).shape[1:]
    report.section(
        "What maximises a gate",
        f"The {EXTREMES} images for which a gate is highest and lowest, with their class and, in a second line, what "
        "the network took them for where that is wrong; and an image made by gradient ascent on the gate's score "
        "before the softmax, unless it stayed flat.",
    )
    made = synthesize_gates(model, widest, (channels, height, width), images.mean, images.std)
    for k, gate in enumerate(widest):
        highest, lowest = data.extremes(gate, EXTREMES)
        captions = [
            [
                "\n→ ".join([images.classes[a], *wrong(a, b)])
                for a, b in zip(data.labels[end].tolist(), data.predictions[end].tolist(), strict=True)
            ]
            for end in (highest, lowest)
        ]
        flat = is_flat(made[k])
        ends = [[images.classes[label] for label in data.labels[end].tolist()] for end in (highest, lowest)]
        report.figure(
            f"gate_{short(gate.router)}_{gate.i + 1}_{gate.j + 1}",
            routing.gate_maximization(
                images.at(highest), images.at(lowest), None if flat else made[k], str(gate), captions
            ),
            f"{gate} is highest for {', '.join(ends[0])}, and lowest for {', '.join(ends[1])}"
            + ("." if flat else "; at the right the image made to maximise it."),
        )

    distinct = routing.most_distinct(data)
    report.section(
        "Gates by class",
        "How the values of a gate are distributed over the images of a few classes: of each router the gate that tells "
        "classes apart best" + ("." if classes else ", with the classes for which it is lowest and highest."),
    )
    report.figure(
        "class_histograms",
        routing.class_histograms(data, distinct, images.classes, classes),
        f"Histograms by class of {', '.join(map(str, distinct))}.",
    )

    report.section(
        "Gate health",
        "Each gate over all images. Entropy is a share of that of even gates. A gate is dead if it exceeds "
        f"{routing.DEAD} for no image, and skewed if it is 0.5 or more for every image (Figure 5.1): all images then "
        "prefer the same way.",
        table=routing.gate_rows(data),
    )
    earlier = collect_routing(before, images.batches()) if before is not None else None
    report.figure("gate_health", routing.gate_health(data, earlier), "Mean and range of every gate; see the table.")

    weights = parallel_weights(model)
    if weights:
        _report_paths(report, weights, similarity, count)
    _report_runs(report, summaries, runs)
    return report.write()


def _class(images: Images, k: int) -> str:
    """Return the name of class k, or k itself for a logit without a class."""
    return images.classes[k] if k < len(images.classes) else str(k)


def verdict(data: RoutingData, similarity: Mapping[str, Tensor]) -> str:
    """Say whether the paths have collapsed into one, and what the last router follows, in a sentence each.

    Paths have collapsed if the CKA between their features in the last parallel layer is above `COLLAPSED`.

    Args:
        data: the gates of every image.
        similarity: from `path_similarity`.
    """
    sentences = []
    if similarity:
        name, cka = list(similarity.items())[-1]
        alike = _between_paths(cka)
        state = "have collapsed" if alike > COLLAPSED else "have not collapsed"
        sentences.append(f"The paths {state}: the CKA between their features in {name} is {alike:.2f}.")
    gates = routing.one_per_vector(data, len(data.gates) * MOST_PATHS)
    last = gates[-1].router
    gates = [gate for gate in gates if gate.router == last]
    values = [data.values(gate) for gate in gates]
    if max(value.std().item() for value in values) < EVEN:
        return " ".join([*sentences, f"The last router, {short(last)}, gives nearly the same gates to all images."])
    shares = {
        "class": max(routing.variance_explained(value, data.labels) for value in values),
        routing.tint(data.colours): max(routing.colour_explained(value, data.colours) for value in values),
    }
    follows = max(shares, key=shares.get)
    shown = ", ".join(f"{name} explains {share:.0%}" for name, share in shares.items())
    what = f"follows {follows}" if shares[follows] >= FOLLOWS else "follows neither class nor " + list(shares)[1]
    return " ".join([*sentences, f"The last router, {short(last)}, {what}: of its gates' variance, {shown}."])


def _similarity(model: nn.Module, images: Images, count: int) -> dict[str, Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:SIMILARITY_IMAGES]
    labels = torch.zeros(128, dtype=torch.long)
    return path_similarity(model, ((images.normalized(images.at(p)), labels[: len(p)]) for p in order.split(128)))


def _report_paths(report: Report, weights: dict, similarity: Mapping[str, Tensor], count: int) -> None:
    report.section(
        "Parallel paths",
        "Paths that collapse into one learn nothing from being parallel. Weights: the Wasserstein distance between the "
        "paths' histograms, in standard deviations; it says nothing of the order of the weights. Features: linear CKA "
        f"over {min(count, SIMILARITY_IMAGES)} images, 1 where they are alike up to rotation and scale.",
        table=[
            {"layer": name, "weights": f"{w[0].numel():,}", "distance, σ": f"{paths.mean_distance(w):.3f}"}
            for name, w in weights.items()
        ],
    )
    names = list(weights)
    kept = torch.linspace(0, len(names) - 1, min(6, len(names))).round().int().tolist()
    some = {names[k]: weights[names[k]] for k in kept}
    report.figure(
        "weight_histograms", paths.weight_histograms(some), f"Histograms of the paths' weights in {', '.join(some)}."
    )
    values = "; ".join(f"{name}: {_between_paths(cka):.2f}" for name, cka in similarity.items())
    report.figure(
        "path_similarity", paths.similarity_matrices(similarity), f"Mean CKA between different paths. {values}."
    )


def _between_paths(cka: Tensor) -> float:
    n = len(cka)
    return ((cka.sum() - cka.diagonal().sum()) / (n * (n - 1))).item()


def _report_runs(
    report: Report, summaries: Mapping[str, Path] | None, runs: Mapping[str, tuple[int, float]] | None
) -> None:
    if summaries:
        report.section("Training", "The run's summary.csv, epoch by epoch.")
        report.figure(
            "learning_curves", curves.learning_curves(summaries), f"Learning curves of {', '.join(summaries)}."
        )
    if runs:
        report.section("Accuracy and size", "The best validation accuracy of each run, by the network's parameters.")
        values = "; ".join(f"{name}: {size / 1e6:.2f} M, {accuracy:.2f} %" for name, (size, accuracy) in runs.items())
        report.figure("accuracy_against_parameters", curves.accuracy_against_parameters(runs), f"{values}.")


@torch.no_grad()
def _convolutions(model: nn.Module, images: Tensor) -> list[nn.Conv2d]:
    """Return the convolutions that images pass through, in order; an autoencoder's clusters need no decoder."""
    passed: list[nn.Conv2d] = []
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    hooks = [layer.register_forward_hook(lambda layer, *_: passed.append(layer)) for layer in convolutions]
    try:
        with frozen(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return passed


def clustering_report(
    report: Report,
    model: nn.Module,
    images: Images,
    *,
    untrained: nn.Module | None = None,
    summaries: Mapping[str, Path] | None = None,
) -> Path:
    """Write the page of a clustering network.

    Args:
        report: an empty report.
        model: images (N, C, H, W) → responses (N, K) before the softmax.
        images: the images.
        untrained: the same network with random weights, to compare responses with.
        summaries: as in `learning_curves`.

    Returns:
        the path of the page.

    Raises:
        ValueError: there are fewer images than each cluster shows, or responses are non-finite.
    """
    with extra("cluster", "the report of a clustering"):
        from sklearn.metrics import normalized_mutual_info_score

        from fastroute.clustering.metrics import cluster_accuracy

    report.progress("Responses to all images")
    responses, labels = collect_responses(model, images.batches())
    if wrong := int((~responses.isfinite().all(1)).sum()):
        raise ValueError(f"the responses to {wrong} of {len(labels)} images are NaN or infinite; {DIVERGED}")
    count = len(labels)
    if count < EXTREMES:
        raise ValueError(f"there are {count} images; a report shows {EXTREMES} for each cluster, and needs as many")
    found = responses.argmax(1)
    some = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:RESPONSES]
    maps = {"trained network": responses[some]}
    if untrained is not None:
        report.progress("Responses of the untrained network")
        shown = [(images.normalized(images.at(part)), labels[part]) for part in some.split(256)]
        maps = {"random network": collect_responses(untrained, shown)[0]} | maps
    sizes = torch.bincount(found, minlength=responses.shape[1]).tolist()
    labelled = bool((labels >= 0).all())
    main = [int(labels[found == k].mode().values) if size and labelled else None for k, size in enumerate(sizes)]
    names = [
        "empty" if not size else "" if m is None else images.classes[m] for size, m in zip(sizes, main, strict=True)
    ]
    verdict = ""
    if labelled:
        accuracy, information = cluster_accuracy(labels, found), normalized_mutual_info_score(labels, found)
        report.facts = {**report.facts, "ACC": f"{accuracy:.3f}", "NMI": f"{information:.3f}"}
        verdict = f"With one cluster to a class, {accuracy:.1%} of the images are in the cluster of their class (ACC). "
    empty = sum(size == 0 for size in sizes)
    report.verdict = verdict + (
        f"The largest cluster has {max(sizes):,} images and the smallest {min(size for size in sizes if size):,}; "
        + ("none is empty." if not empty else f"{empty} of {len(sizes)} are empty.")
    )
    report.section("Responses", f"t-SNE of the responses to {len(some):,} images, before the softmax.")
    report.figure(
        "responses",
        clusters.response_map(maps, names=names),
        f"Map of responses, coloured by cluster. Images in each cluster: {', '.join(map(str, sizes))}.",
    )

    size = images.at(torch.tensor([0])).shape[1:]
    options = {"mean": images.mean, "std": images.std}
    nodes = list(range(min(10, responses.shape[1])))
    which = "cluster" if len(nodes) == responses.shape[1] else f"of the first {len(nodes)} clusters"
    top = {
        f"{k}: {legible(names[k], 10)}".removesuffix(": "): images.at(responses[:, k].topk(EXTREMES).indices)
        for k in nodes
    }
    report.section(
        "Clusters",
        f"The {EXTREMES} images with the highest relevance score of each {which}, which is named by the class that "
        "most of its images have, and at the right an image made to maximise it, unless it stayed flat.",
        table=[
            {
                "cluster": str(k),
                "images": f"{size:,}",
                "main class": name,
                "of that class": "" if m is None else f"{(labels[found == k] == m).double().mean().item():.0%}",
            }
            for k, (size, name, m) in enumerate(zip(sizes, names, main, strict=True))
        ],
    )
    mains = "; ".join(
        f"{k}: {names[k] or f'{sizes[k]:,} images'}" if main[k] is None else f"{k}: mostly {names[k]}" for k in nodes
    )
    report.figure(
        "clusters",
        clusters.cluster_images(top, synthesize_outputs(model, nodes, size, **options)),
        f"Clusters: {mains}.",
    )
    if labelled:
        report.section(
            "Against the labels",
            "The share of each class in each cluster, in percent. Training used no labels.",
        )
        report.figure("confusion", clusters.confusion(labels, found, images.classes), f"Clusters by class: {mains}.")

    layers = _convolutions(model, images.normalized(images.at(torch.tensor([0]))))
    if layers:
        report.section(
            "Filters",
            "Images made to maximise filters of the first and of the last convolution, without those that stayed flat.",
        )
        made = {}
        for where, layer in {"first": layers[0], "last": layers[-1]}.items():
            filters = torch.linspace(0, layer.out_channels - 1, min(16, layer.out_channels)).round().int().tolist()
            made[f"{where} convolution"] = synthesize_filters(model, layer, filters, size, **options)
        report.figure(
            "filters", clusters.filter_images(made), "Images that maximise filters of the first and last layer."
        )
    _report_runs(report, summaries, None)
    return report.write()
