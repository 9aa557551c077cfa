"""Predict class probabilities of images by the network of a checkpoint."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastroute._devices import indexed, resolve_device
from fastroute._errors import in_a_line
from fastroute._plain import plain
from fastroute.inference.preprocessing import Picture, Preprocessing
from fastroute.models._shapes import check_takes, like
from fastroute.models.conversion import multipath
from fastroute.models.specification import Specification, side, specification_in, specification_of
from fastroute.models.weights import load_state
from fastroute.nn import MultiPathNetwork

RUN_BY = {".onnx": "onnxruntime.InferenceSession", ".pt2": "torch.export.load(…).module()"}

WEIGHTS_ALONE = (
    "evaluate them by fastroute validate --model, or start a run from them by --pretrained-path: they do not say how "
    "images are prepared. In Python, Predictor(network, classes, Preprocessing(…), device) says so"
)


@dataclass(frozen=True, eq=False)
class Prediction:
    """The predictions of a network for N images.

    Attributes:
        probabilities: (N, K), float32, on the CPU; each row sums to 1.
        classes: the K names.
        gates: router name → (N, m, n), the weight of each incoming path in each outgoing one, or (N, n) of a
            `SparseRouter`; None unless requested.

    Example:
        >>> prediction = Prediction(torch.tensor([[0.2, 0.8]]), ["ant", "bee"])
        >>> prediction.labels, prediction.top(1)
        (['bee'], [[('bee', 0.800000011920929)]])
    """

    probabilities: Tensor
    classes: Sequence[str]
    gates: dict[str, Tensor] | None = None

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """Return the k most probable classes of each image with their probabilities, the most probable first.

        Args:
            k: at least 1; values above K count as K.

        Raises:
            ValueError: k is less than 1.
        """
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        values, indices = self.probabilities.topk(min(k, self.probabilities.shape[1]))
        return [
            [(self.classes[i], value) for i, value in zip(row, of_row, strict=True)]
            for row, of_row in zip(indices.tolist(), values.tolist(), strict=True)
        ]

    @property
    def labels(self) -> list[str]:
        """The most probable class of each image."""
        return [self.classes[i] for i in self.probabilities.argmax(1).tolist()]

    def __len__(self) -> int:
        return len(self.probabilities)

    def __getitem__(self, index: int | slice) -> "Prediction":
        """Return the predictions of one image, or of some."""
        if not isinstance(index, slice):
            index = range(len(self))[index]  # raises IndexError, as a list does
            index = slice(index, index + 1)
        gates = None if self.gates is None else {name: gates[index] for name, gates in self.gates.items()}
        return replace(self, probabilities=self.probabilities[index], gates=gates)

    def __iter__(self) -> Iterator["Prediction"]:
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype=None, copy=None):
        return self.probabilities.numpy().astype(dtype or "float32")

    def __repr__(self) -> str:
        shown = ", ".join(f"{row[0][0]} {row[0][1]:.3f}" for row in self[:3].top(1))
        images = f"{len(self)} image{'s' * (len(self) != 1)}"
        return f"Prediction({images} of {len(self.classes)} classes: {shown}{', …' * (len(self) > 3)})"


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained network with its classes and the preprocessing of its images, from `load`.

    Attributes:
        model: the network, in evaluation mode.
        classes: the names of its logits, in their order.
        transform: image → the network's input (C, H, W).
        device: the device of the network.
        specification: how the network is built; None if unknown.
    """

    model: nn.Module
    classes: Sequence[str]
    transform: Preprocessing
    device: torch.device
    specification: Specification | None = field(default=None, repr=False)

    def __call__(
        self, images: "Picture | Sequence[Picture]", *, gates: bool = False, batch_size: int = 64
    ) -> Prediction:
        """Predict the class probabilities of images.

        Args:
            images: one image or a list of images, as `transform` takes them: a path, the bytes of a file, a PIL image,
                or uint8 values; or floating-point tensors (N, C, H, W) or (C, H, W), already normalised as by
                `transform`.
            gates: whether to return each router's gates too.
            batch_size: the number of images computed at a time.

        Returns:
            the predictions, in the order of the images.

        Raises:
            ValueError: an image has another number of channels than the network takes, or gates are requested but the
                network has no routers.
            UnreadableImage: a file cannot be read as an image.
            TypeError: an image is of another type.
        """
        if gates and not self.routed:
            raise ValueError("gates is True, but the network has no routers")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if getattr(images, "ndim", 0) == 4:
            images = list(images)
        elif not isinstance(images, list | tuple):
            images = [images]
        parts, of_parts = [], []
        for start in range(0, len(images), batch_size):
            logits, routing = self._compute([self._input(image) for image in images[start : start + batch_size]], gates)
            parts.append(logits.float().softmax(1).cpu())
            of_parts.append({name: value.gates.float().cpu() for name, value in routing.items()})
        if not parts:
            return Prediction(torch.empty(0, len(self.classes)), self.classes, {} if gates else None)
        names = of_parts[0] if gates else {}
        joined = {name: torch.cat([of_part[name] for of_part in of_parts]) for name in names}
        return Prediction(torch.cat(parts), self.classes, joined if gates else None)

    @property
    def routed(self) -> bool:
        """Whether the network has routers whose gates can be returned."""
        from fastroute.nn.routed import routers_in

        return bool(routers_in(self.model))

    def _input(self, image: Picture) -> Tensor:
        if not isinstance(image, Tensor) or not image.is_floating_point():
            return self.transform(image)
        if image.dim() != 3 or image.shape[0] != self.transform.in_chans:
            raise ValueError(
                f"images has a tensor of the shape {tuple(image.shape)}; a normalised image must be (C, H, W) with "
                f"C={self.transform.in_chans}"
            )
        return image.float()

    @torch.no_grad()
    def _compute(self, inputs: list[Tensor], gates: bool) -> tuple[Tensor, dict]:
        from fastroute.nn import forward_with_routing

        if len({tuple(x.shape) for x in inputs}) > 1:
            raise ValueError("images has tensors of several shapes; they must have one")
        x = torch.stack(inputs).to(self.device, like(self.model).dtype)
        return forward_with_routing(self.model, x) if gates else (self.model(x), {})

    def __repr__(self) -> str:
        network = self.specification or type(self.model).__name__
        return f"Predictor({network}, {len(self.classes)} classes, {self.transform!r}, on {self.device})"


def load(
    checkpoint: str | Path,
    *,
    model: str | nn.Module | None = None,
    ema: bool = True,
    device: str | torch.device | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    classes: Sequence[str] | None = None,
) -> Predictor:
    """Load a trained network, ready to predict.

    The classes of a clustering are its clusters, named by their numbers in assignments.csv. Its images need no options.

    Args:
        checkpoint: a file of `fit`, `fastroute train` or `fastroute cluster`, or a `.safetensors` of `fastroute
            export`.
        model: the network, whose weights are changed in-place, or "package.module:function" to import and call. It is
            needed only for networks that such a function builds, or whose construction the checkpoint does not know; a
            checkpoint alone never imports code.
        ema: whether to take the moving average of the weights if the run kept one.
        device: the device of the network; by default the GPU if there is one.
        mean, std: of the images, in units of 0 to 255; by default as in training, as are img_size and crop_pct. A run
            on loaders of your own keeps only img_size: give mean and std, and crop_pct if it is not 1.
        img_size: the height and width to which images are cropped, in pixels.
        crop_pct: the crop's side, relative to the shorter side of the scaled image.
        classes: the names of the logits, in their order. A run on loaders of your own does not know them: by default
            they are "0", "1", ….

    Returns:
        a `Predictor`: `predictor("cat.jpg").top(5)`.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: model is neither a module nor a string, or classes are no strings.
        ValueError: the file is not a checkpoint, is damaged or of another network, or does not say how its network is
            built; classes are not as many as the logits; or an option is given that a clustering has no use for.

    Example:
        >>> predictor = fastroute.load("runs/flowers/best.ckpt")
        >>> predictor(["rose.jpg", "tulip.png"]).top(2)
        [[('rose', 0.98), ('peony', 0.01)], [('tulip', 0.95), ('crocus', 0.03)]]
    """
    from fastroute.training.checkpoints import check_command, is_of, read_checkpoint  # needs the extra "train"

    if not isinstance(model, nn.Module | str | None):
        raise TypeError(
            f"model is {getattr(model, '__name__', model)!r}; it must be a torch.nn.Module, or "
            "'package.module:function' to import and call"
        )
    path, where = Path(checkpoint), f"checkpoint is {checkpoint}"
    target = indexed(resolve_device(device, others=True))
    given = {"img_size": side(plain(img_size)), "crop_pct": plain(crop_pct)}
    for name, value in (("mean", mean), ("std", std)):
        given[name] = (
            None if value is None else torch.as_tensor(value, dtype=torch.float32).detach().clone().reshape(-1)
        )
    given = {name: value for name, value in given.items() if value is not None}
    names = _checked_classes(classes)
    if path.suffix == ".safetensors":
        return _named(_load_exported(path, where, model, given, target), names)
    if path.suffix in RUN_BY:
        raise ValueError(f"{where}; it must be a .ckpt or .safetensors: run such a program by {RUN_BY[path.suffix]}")
    saved = read_checkpoint(path, "checkpoint", weights_alone=WEIGHTS_ALONE)
    if is_of("cluster", saved):
        others = {"model": model, "classes": names}
        given |= {name: value for name, value in others.items() if value is not None}
        return _load_clustering(saved, path, where, given, target)
    check_command(saved, "train", path, "checkpoint")
    run, data = saved["hyper_parameters"], saved.get("ImageDataModule", {})
    network = model if isinstance(model, nn.Module) else network_of(run, where, model, saved.get("conversion"))
    load_state(network, saved, where, ema)
    transform = replace(Preprocessing.of_run(run, data), **given)
    transform.check_sizes()
    _check_units(given)
    return _named(predictor_of(network, data.get("classes"), transform, target, "img_size" in given), names)


def _checked_classes(classes: Sequence[str] | None) -> list[str] | None:
    names = plain(classes)
    if isinstance(names, Iterable) and not isinstance(names, str):
        names = list(names)
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise TypeError(f"classes is {names!r}; it must be a list of names")
    return names


def _named(predictor: Predictor, classes: list[str] | None) -> Predictor:
    """Return a predictor with other names of its classes, if any are given."""
    if classes is None:
        return predictor
    if len(classes) != len(predictor.classes):
        raise ValueError(
            f"classes has {len(classes)} names; it must have one for each of {len(predictor.classes)} logits"
        )
    return replace(predictor, classes=classes)


def _check_units(given: Mapping[str, Any]) -> None:
    """Raise ValueError if mean or std seem to be in units of 0 to 1, as other programs have them."""
    for name in given.keys() & {"mean", "std"}:
        value = given[name]
        if value.max() <= 1 and ((value > 0) & (value < 1)).any():
            raise ValueError(
                f"{name} is {[round(v, 6) for v in value.tolist()]}; it must be in units of 0 to 255: multiply it by "
                "255 if it is in units of 0 to 1"
            )


def network_of(
    run: dict, where: str, own: str | None = None, conversion: dict[str, Any] | None = None, **sizes
) -> nn.Module:
    """Build the network that the `hyper_parameters` of a checkpoint describe, with fresh weights.

    Args:
        run: the hyper-parameters, of checked types; see `check_fields`.
        where: the argument and its value, such as "checkpoint is best.ckpt", for messages.
        own: "package.module:function", if the user names it; a checkpoint alone must not import code.
        conversion: how `multipath` is to convert what `own` returns, unless that has parallel paths already.
        sizes: num_classes, in_chans or img_size, to replace those of the run.

    Raises:
        ValueError: the network cannot be built.
    """
    specification = specification_in(run, where) if own is None else _own_specification(run, where, own)
    try:
        network = specification.build(**sizes, imports=own is not None)
        if own is None or conversion is None or any(isinstance(m, MultiPathNetwork) for m in network.modules()):
            return network
        return multipath(network, **conversion)
    except ValueError as error:
        raise ValueError(f"{where}; {error}") from error


def _own_specification(run: dict, where: str, own: str) -> Specification:
    given = Specification.parse(own)
    if run.get("specification") is None and "specification" in run:  # the user's own module
        return replace(given, num_classes=run["num_classes"], in_chans=run["in_chans"], img_size=run["img_size"])
    specification = specification_in(run, where)
    if specification.source != "function":
        if given == Specification.parse(specification.text):
            return specification
        raise ValueError(f"model is {own!r}, but {where} of {specification.text!r}; leave model out")
    return replace(specification, source=given.source, name=given.name)


def predictor_of(
    network: nn.Module,
    classes: Sequence[str] | None,
    transform: Preprocessing,
    device: torch.device,
    check: bool = False,
) -> Predictor:
    """Make a predictor of a network with loaded weights; logits without a class are named by their numbers.

    With `check`, the network is checked to take images of the size of `transform`.
    """
    network, specification = network.to(device).eval(), specification_of(network)
    name = type(network).__name__ if specification is None else str(specification)
    count, names = None if specification is None else specification.num_classes, list(classes or [])
    if check or count is None:
        try:
            count = check_takes(network, name, transform.in_chans, transform.img_size)
        except ValueError as error:
            if check:
                raise
            raise ValueError(
                f"{error}. If its images have another size, give img_size. Predictors take square images; for others, "
                "and for other data, load the module by RoutingClassifier.load_from_checkpoint(path, model=network)"
            ) from error
    names += [str(i) for i in range(len(names), count)]
    return Predictor(network, names, transform, device, specification)


def _load_clustering(saved: dict, path: Path, where: str, given: dict[str, Any], device: torch.device) -> Predictor:
    """Load the network of `fastroute cluster`, which takes values from 0 to 1."""
    from fastroute.clustering.build import ClusteringRun, build
    from fastroute.clustering.module import LogPosteriors

    if given:
        raise ValueError(f"{next(iter(given))} is given, but {path} is a clustering, which has its own: leave it out")
    shape = saved.get("shape")
    if not (isinstance(shape, list) and len(shape) == 3 and all(type(size) is int and size > 0 for size in shape)):
        raise ValueError(
            f"{where}; it does not say of which shape its images are, as files of early versions do not: resume the "
            "run with more epochs, or cluster anew"
        )
    module = build(ClusteringRun.of(saved["hyper_parameters"]), shape)
    load_state(module, saved, where)
    centers = getattr(module, "centers", None)
    if centers is not None and not centers.any():
        raise ValueError(f"{where}; its run has stopped before it placed the clusters: resume it")
    transform = Preprocessing(shape[1], shape[0], mean=torch.zeros(1), std=torch.tensor([255.0]))
    names = [str(k) for k in range(module.num_clusters)]
    return Predictor(LogPosteriors(module).to(device).eval(), names, transform, device)


def _load_exported(
    path: Path, where: str, model: str | nn.Module | None, given: dict[str, Any], device: torch.device
) -> Predictor:
    """Load a file of `fastroute export --to safetensors`, by its metadata."""
    from fastroute.models.weights import read_weights
    from fastroute.training.saved_fields import check_images

    weights, metadata = read_weights(path, "checkpoint"), _metadata(path)
    try:
        classes, data = json.loads(metadata["classes"]), json.loads(metadata["preprocessing"])
        specification = json.loads(metadata["specification"])
        levels = {name: 255 * torch.tensor(data[name]).float() for name in ("mean", "std") if data[name] is not None}
        data = {name: value for name, value in data.items() if value is not None} | levels
        check_images({"classes": classes} | data)
        transform = Preprocessing(**data)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{where}; its metadata is not that of `fastroute export`, which says how the network is built and what "
            f"images become: use the checkpoint itself ({in_a_line(error)})"
        ) from None
    run = {"model": "network", "specification": specification} | {
        "num_classes": len(classes),
        "in_chans": transform.in_chans,
        "img_size": transform.img_size,
    }
    network = model if isinstance(model, nn.Module) else network_of(run, where, model)
    load_state(network, weights, where)
    transform = replace(transform, **given)
    transform.check_sizes()
    _check_units(given)
    return predictor_of(network, classes, transform, device, "img_size" in given)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}
