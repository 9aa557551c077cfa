"""A checkpoint as a function from images to class probabilities."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastroute._errors import in_a_line
from fastroute.inference.preprocessing import Picture, Preprocessing
from fastroute.models.specification import Specification, specification_in
from fastroute.models.weights import differences, network_weights


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network says of N images.

    Attributes:
        probabilities: (N, K), float32, on the CPU; each row sums to 1.
        classes: the K names.
        gates: router name → (N, m, n), the weight of each incoming path in each outgoing one; None unless asked for.
    """

    probabilities: Tensor
    classes: Sequence[str]
    gates: dict[str, Tensor] | None = None

    def top(self, k: int = 5) -> list[list[tuple[str, float]]]:
        """For each image, the k most probable classes with their probabilities, the most probable first."""
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
        """That of one image, or of some."""
        if isinstance(index, int):
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
        return f"Prediction({len(self)} images of {len(self.classes)} classes: {shown}{', …' * (len(self) > 3)})"


@dataclass(frozen=True, eq=False)
class Predictor:
    """A trained network with what it needs to know of images; made by `load`.

    Attributes:
        model: the network, in evaluation.
        classes: the names of its logits, in their order.
        transform: image → the network's input (C, H, W).
        device: where it computes.
        specification: how the network is built, where that is known.
    """

    model: nn.Module
    classes: Sequence[str]
    transform: Preprocessing
    device: torch.device
    specification: Specification | None = field(default=None, repr=False)

    def __call__(
        self, images: "Picture | Sequence[Picture]", *, gates: bool = False, batch_size: int = 64
    ) -> Prediction:
        """The class probabilities of images.

        Args:
            images: one image or a list of them, each as `transform` takes it: a path, the bytes of a file, a PIL image,
                or uint8 values; or floating-point tensors, (N, C, H, W) or (C, H, W) each, which are taken to be
                normalised as `transform` and the run's data module do it.
            gates: whether each router's gates are returned too.
            batch_size: how many images are computed at a time.

        Raises:
            ValueError: an image has other channels than the network takes, or gates are asked of a network without.
            UnreadableImage: a file cannot be read as an image.
            TypeError: an image is something else.
        """
        if gates and not self.routed:
            raise ValueError("gates is True, but the network has no routers")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if (isinstance(images, Tensor) and images.dim() == 4) or getattr(images, "ndim", 0) == 4:
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
        from fastroute.nn import Router, SparseRouter

        return any(isinstance(module, Router | SparseRouter) for module in self.model.modules())

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
        if len({tuple(x.shape) for x in inputs}) > 1:
            raise ValueError("images has tensors of several shapes; they must have one")
        x = torch.stack(inputs).to(self.device)
        return self.model(x, return_routing=True) if gates else (self.model(x), {})

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
) -> Predictor:
    """A trained network, ready to predict.

    Args:
        checkpoint: a file of `fit` or `fastroute train`, or a `.safetensors` of `fastroute export`.
        model: only for networks that the checkpoint does not say how to build, or that a function of your own builds:
            the network, or "package.module:function", which is imported; a checkpoint never names code to run.
        ema: whether the moving average of the weights is taken where the run kept one.
        device: where it computes; by default the GPU where there is one.
        mean, std: of the images, in units of 0 to 255; by default as in training, as are img_size and crop_pct.
        img_size: the height and width that images are cut to.
        crop_pct: the crop's side by that of the scaled image.

    Returns:
        a `Predictor`: `predictor("cat.jpg").top(5)`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, is damaged or of another network, or does not say how its network is built.

    Example:
        >>> predictor = fastroute.load("runs/flowers/best.ckpt")
        >>> predictor(["rose.jpg", "tulip.png"]).top(2)
        [[('rose', 0.98), ('peony', 0.01)], [('tulip', 0.95), ('crocus', 0.03)]]
    """
    from fastroute.training.checkpoints import check_command, read_checkpoint  # which needs the extra "train"

    path, where = Path(checkpoint), f"checkpoint is {checkpoint}"
    target = _device(device)
    if path.suffix == ".safetensors":
        return _load_exported(path, where, model, target)
    saved = read_checkpoint(path, "checkpoint")
    check_command(saved, "train", path, "checkpoint")
    run, data = saved["hyper_parameters"], saved.get("ImageDataModule", {})
    network = model if isinstance(model, nn.Module) else network_of(run, where, model)
    load_state(network, network_weights(saved, ema), where)
    transform = Preprocessing.of_run(run, data)
    given = {"img_size": img_size, "crop_pct": crop_pct}
    given |= {name: None if v is None else torch.tensor(v).float() for name, v in (("mean", mean), ("std", std))}
    transform = replace(transform, **{name: value for name, value in given.items() if value is not None})
    return predictor_of(network, data.get("classes"), transform, target)


def network_of(run: dict, where: str, own: str | None = None, **sizes) -> nn.Module:
    """The network that the `hyper_parameters` of a checkpoint describe, with fresh weights.

    Args:
        run: the fields are of their types; see `check_fields`.
        where: the argument and its value, such as "checkpoint is best.ckpt", for messages.
        own: "package.module:function" where the user names it; the checkpoint's own word is not enough to import it.
        sizes: in the place of the run's.

    Raises:
        ValueError: it cannot be built.
    """
    specification = specification_in(run, where) if own is None else _named_again(run, where, own)
    try:
        return specification.build(**sizes, imports=own is not None)
    except ValueError as error:
        raise ValueError(f"{where}; {error}") from error


def _named_again(run: dict, where: str, own: str) -> Specification:
    given = Specification.parse(own)
    if run.get("specification") is None and "specification" in run:  # a module of the user's, built by hand
        return replace(given, num_classes=run["num_classes"], in_chans=run["in_chans"], img_size=run["img_size"])
    specification = specification_in(run, where)
    if specification.source != "function":
        if given == replace(Specification.parse(specification.text)):
            return specification
        raise ValueError(f"model is {own!r}, but {where} of {specification.text!r}; leave model out")
    return replace(specification, source=given.source, name=given.name)


def load_state(network: nn.Module, weights: Any, where: str) -> None:
    """Load a state_dict, with a sentence where it is of another network."""
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise ValueError(f"{where}; it holds a {type(weights).__name__}, and must hold a state_dict")
    if reason := differences(network.state_dict(), weights):
        raise ValueError(f"{where}; its weights are of another network: {reason}")
    network.load_state_dict(weights)


def predictor_of(
    network: nn.Module, classes: Sequence[str] | None, transform: Preprocessing, device: torch.device
) -> Predictor:
    """A network that has its weights, with names for all its logits: their numbers where there are no others."""
    network = network.to(device).eval()
    specification = getattr(network, "specification", None)
    names, count = list(classes or []), specification.num_classes if specification is not None else None
    if count is None:
        with torch.no_grad():
            x = torch.zeros(1, transform.in_chans, transform.img_size, transform.img_size, device=device)
            count = network(x).shape[1]
    names += [str(i) for i in range(len(names), count)]
    return Predictor(network, names, transform, device, specification)


def _load_exported(path: Path, where: str, model: str | nn.Module | None, device: torch.device) -> Predictor:
    """Of `fastroute export --to safetensors`, by its metadata."""
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
    return predictor_of(network, classes, transform, device)


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}; this machine has no GPU that PyTorch can use")
    return device
