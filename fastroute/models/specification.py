"""Specifications of networks: source, name and arguments, as plain values that a checkpoint can hold."""

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastroute import _version
from fastroute._memory import check_memory
from fastroute._plain import plain
from fastroute.models.registry import model_info
from fastroute.models.sources import BUILDERS, KNOWN, Request, check_own, inferred, layout
from fastroute.models.weights import fits, load_pretrained, read_weights, without_wrappers
from fastroute.nn import GateNorm, MultiPathNetwork, set_gate_norm
from fastroute.nn.gate_norm import GATE_NORMS, PRIORS
from fastroute.ops._paths import MAX_PATHS, check_integers

SOURCES = ("fastroute", "timm", "torchvision", "function")
NOT_KEPT = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only"),
    *("weights", "weights_backbone", "progress", "checkpoints", "num_classes", "in_chans", "img_size"),
)
"""Arguments of builders that a specification does not keep, since they name files or have their own fields."""

CONVERSION = ("paths", "route_after", "routing", "init", "input_size", "gate_norm", "prior")
"""Arguments of `multipath`, which are fields of a specification too."""

FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
NAME = re.compile(r"[\w.\-]{1,200}")
LARGE, MOST, LONGEST, DEPTH = 2**14, 2**20, 1000, 4


@dataclass(frozen=True)
class Specification:
    """How a network is built, in plain values: no code and no weights.

    Attributes:
        source: "fastroute", "timm", "torchvision", or "function" for a function of the user's.
        name: of the network there; "package.module:function".
        num_classes: the number of logits; None takes the source's default.
        in_chans: the channels of the images.
        img_size: the height and width of the images, in pixels; None takes the source's default.
        kwargs: further arguments of the network itself.
        paths: 1, or the number of parallel paths for `multipath`.
        route_after, routing, init: arguments of `multipath`.
        input_size: (channels, height, width) of the images by which the channels at the cuts are found; None takes
            (in_chans, img_size, img_size).
        gate_norm, prior: how the routers normalise their gates; see `nn.CrossConnection`.
        versions: package → version with which the network was built, for the reader.

    Example:
        >>> specification = create_model("resnet20_cc2", 7).specification
        >>> specification.name, specification.num_classes
        ('resnet20_cc2', 7)
        >>> Specification.from_dict(specification.to_dict()) == specification
        True
    """

    source: str
    name: str
    num_classes: int | None = None
    in_chans: int = 3
    img_size: int | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    paths: int = 1
    route_after: str | tuple[str, ...] = "auto"
    routing: str | None = "cc"
    init: str = "fresh"
    input_size: tuple[int, ...] | None = None
    gate_norm: str | None = None
    prior: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name != "kwargs":  # which the network's builder takes as they are
                object.__setattr__(self, item.name, plain(getattr(self, item.name)))
        object.__setattr__(self, "img_size", side(self.img_size))

    @classmethod
    def parse(cls, text: str, **arguments) -> "Specification":
        """Return the specification of a network by its name on the command line.

        Args:
            text: such as "resnet20_cc2" or "timm:resnet18".
            arguments: further fields.

        Raises:
            TypeError: the name is no text.
            ValueError: there is no such source, or no registered network of that name.
        """
        if not isinstance(text, str):
            raise TypeError(f"model is {text!r}; it must be a text, {KNOWN}")
        source, colon, name = text.partition(":")
        if not colon:
            source, name = "fastroute", text
        elif source not in SOURCES[:3]:
            source, name = "function", text
        if source == "function" and not FUNCTION.fullmatch(name):
            raise ValueError(f"model is {text!r}; it must be {KNOWN}")
        if source in ("timm", "torchvision") and not NAME.fullmatch(name):
            raise ValueError(f"model is {text!r}; {source}:NAME takes the name of a network of {source}'s")
        specification = cls(source, name, **arguments)
        if source == "fastroute":
            check_own(name)
        return specification

    @property
    def text(self) -> str:
        """The name on the command line, without arguments."""
        return self.name if self.source in ("fastroute", "function") else f"{self.source}:{self.name}"

    def __str__(self) -> str:
        return self.text if self.paths == 1 else f"{self.text} ({self.paths} paths)"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values: numbers, texts, lists and dicts."""
        return _with_lists(asdict(self))

    @classmethod
    def from_dict(cls, values: Any) -> "Specification":
        """Return the specification that `to_dict` has turned into plain values.

        The values are checked, since they may come from a file of unknown origin.

        Raises:
            ValueError: a field is missing, unknown, or of another type or size than it can have.
        """
        if not isinstance(values, dict):
            raise ValueError(f"its specification is a {type(values).__name__}, expected a dict")
        names = {item.name for item in fields(cls)}
        if unknown := [key for key in values if key not in names]:
            raise ValueError(f"its specification has {unknown[0]!r:.50}, which this version does not know")
        for name in ("source", "name"):
            if name not in values:
                raise ValueError(f"its specification[{name!r}] is missing")
        for name, value in values.items():
            expected, holds = _FIELDS[name]
            if not holds(value):
                raise ValueError(f"its specification[{name!r}] is {_short(value)}, expected {expected}")
        pattern = FUNCTION if values["source"] == "function" else NAME
        if not pattern.fullmatch(values["name"]):
            raise ValueError(f"its specification['name'] is {_short(values['name'])}, expected the name of a network")
        if refused := [name for name in values.get("kwargs", {}) if name in NOT_KEPT]:
            raise ValueError(f"its specification['kwargs'] has {refused[0]!r}, which no specification keeps")
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})

    def differences(self, other: "Specification") -> str:
        """Describe the fields in which another specification differs; "" if both build the same network."""
        names = [item.name for item in fields(self) if item.compare and item.name not in ("img_size", "input_size")]
        pairs = ((name, _with_lists(getattr(self, name)), _with_lists(getattr(other, name))) for name in names)
        return ", ".join(f"{name}={a!r}, not {b!r}" for name, a, b in pairs if a != b)

    def describes(self, network: nn.Module) -> bool:
        """Return whether the layers of a network are still those that it had when this was attached to it."""
        return network._specified == layout(network)

    def follow(self, network: nn.Module, **changes) -> None:
        """Attach this specification to a network that was changed so that these fields differ."""
        remember(network, replace(self, **changes))

    def build(
        self,
        num_classes: int | None = None,
        in_chans: int | None = None,
        img_size: int | None = None,
        *,
        pretrained: bool = False,
        pretrained_path: str | Path | None = None,
        imports: bool = False,
        say: Callable[[str], None] = print,
    ) -> nn.Module:
        """Build the network, with fresh or pretrained weights.

        Args:
            num_classes, in_chans, img_size: replace those of the specification.
            pretrained: whether timm or torchvision downloads its weights.
            pretrained_path: a file of weights of the network or of its single path; see `load_pretrained`.
            imports: whether a function of the user's may be imported. A specification from a file must not decide this.
            say: called with a sentence about each change that the weights needed.

        Returns:
            the network, with the attribute `specification`.

        Raises:
            TypeError: a size is no integer.
            ValueError: there is no such network, it does not take an argument, or the weights do not fit.
            ModuleNotFoundError: timm or torchvision is not installed.
            FileNotFoundError: there is no file at pretrained_path.
        """
        given = {"num_classes": num_classes, "in_chans": in_chans, "img_size": img_size}
        spec = replace(self, **{name: value for name, value in given.items() if value is not None})
        sizes = {name: getattr(spec, name) for name in given}
        if spec.source != "fastroute":  # whose networks alone take square images only
            del sizes["img_size"]
        check_integers(**{name: size for name, size in sizes.items() if size is not None})
        if pretrained and pretrained_path is not None:
            raise ValueError(f"pretrained is True, and pretrained_path is {pretrained_path}; give one of them")
        if pretrained and spec.source in ("fastroute", "function"):
            raise ValueError(
                f"pretrained is True; there are no weights of {spec.text} to download: name a file of weights with "
                "pretrained_path"
            )
        renormalised = spec.source == "torchvision" and spec.name in ("googlenet", "inception_v3")
        if pretrained and renormalised and spec.in_chans == 3:
            # Their weights expect another normalisation, which the network then does itself.
            spec = replace(spec, kwargs={"transform_input": True} | dict(spec.kwargs))
        spec._check_kwargs()
        if spec.source == "function" and not imports:
            raise ValueError(
                f"its network is built by {spec.name}, and own code is imported only where you name it: add "
                f"--model {spec.name}, or in Python load(path, model={spec.name!r})"
            )
        network = BUILDERS[spec.source](spec._request, **({"pretrained": True} if pretrained else {}))
        if spec.kwargs.get("checkpoints") and hasattr(network, "members"):
            spec = spec._of_members(network.members[0].specification)
        if spec.num_classes is None:
            spec = replace(spec, num_classes=spec._default_classes(network))
        remember(
            network,
            replace(
                spec,
                paths=1,
                route_after="auto",
                routing="cc",
                init="fresh",
                input_size=None,
                gate_norm=None,
                prior=None,
            ),
        )
        weights = None if pretrained_path is None else without_wrappers(read_weights(pretrained_path), network)
        where = f"pretrained_path is {pretrained_path}"
        if spec.paths > 1:
            if spec.init == "fresh" and (pretrained or weights is not None):
                say("init is 'fresh': only the first path starts from these weights; use init='copy' for all paths")
            if weights is not None and fits(network, weights):
                load_pretrained(network, weights, where, say=say)
                weights = None
            network = spec._cut(network)
        with_statistics = any("gate_norm." in name for name in weights or ())
        if with_statistics:
            spec._normalise_gates(network)
        if weights is not None:
            load_pretrained(network, weights, where, say=say)
        if not with_statistics:  # the gates start with fresh ones
            spec._normalise_gates(network)
        return network

    def _of_members(self, member: "Specification") -> "Specification":
        """Return the specification of an ensemble from checkpoints, with the sizes of a member."""
        sizes = {}
        for name, default in (("num_classes", None), ("in_chans", 3), ("img_size", None)):
            given, own = getattr(self, name), getattr(member, name)
            if given not in (default, own) and own is not None:
                raise ValueError(f"{name} is {given}; the networks of checkpoints have {own}: leave it out")
            sizes[name] = given if own is None else own
        return replace(self, **sizes)

    def _default_classes(self, network: nn.Module) -> int | None:
        if self.source == "fastroute":
            return model_info(self.name).num_classes
        return 1000 if self.source == "torchvision" else getattr(network, "num_classes", None)

    @property
    def _request(self) -> Request:
        return Request(self.name, self.num_classes, self.in_chans, self.img_size, self.kwargs)

    def _cut(self, network: nn.Module) -> nn.Module:
        from fastroute.models.conversion import multipath

        size = self.input_size
        if size is None and self.img_size is not None:
            size = self.in_chans, self.img_size, self.img_size
        route_after = self.route_after if self.route_after == "auto" else list(self.route_after)
        return multipath(network, self.paths, route_after, self.routing, init=self.init, input_size=size)

    def _normalise_gates(self, network: nn.Module) -> None:
        if self.gate_norm is not None or self.prior is not None:
            set_gate_norm(network, self.gate_norm, self.prior)

    def _check_kwargs(self) -> None:
        for name in self.kwargs:
            if name in NOT_KEPT and name != "checkpoints":  # an ensemble takes these, in Python
                raise ValueError(
                    f"model_kwargs has {name!r}, which is not for the network itself: it has its own option"
                )
        if any(size >= LARGE for size in _sizes(self.kwargs)):  # before it takes all memory
            check_memory(self._bytes(), f"model is {self.text!r}; its weights would take", "lower its arguments")

    def _bytes(self) -> int:
        with torch.device("meta"):
            network = BUILDERS[self.source](self._request)
        return sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())


def side(size: Any) -> Any:
    """Return the height and width of square images that are given as two equal numbers; others as they are."""
    return size[0] if isinstance(size, list | tuple) and len(size) == 2 and size[0] == size[1] else size


def remember(network: nn.Module, specification: Specification | None) -> nn.Module:
    """Attach a specification to a network, as its attribute `specification`, and return the network.

    A digest of the layers is attached with it, which tells later whether the specification still holds. A specification
    with arguments that are no plain values is not kept.
    """
    if specification is not None:
        kwargs = {name: plain(value) for name, value in specification.kwargs.items() if name not in NOT_KEPT}
        specification = replace(specification, kwargs=kwargs, versions=_versions(specification.source))
        try:
            Specification.from_dict(specification.to_dict())
        except (TypeError, ValueError):
            specification = None
    network.specification = specification
    network._specified = None if specification is None else layout(network)
    return network


def specification_of(network: nn.Module) -> Specification | None:
    """Return how a network was built, if `create_model`, `multipath`, timm or torchvision built it.

    Args:
        network: any module.

    Returns:
        the specification; None for other networks, and for those whose layers were changed since.

    Example:
        >>> specification_of(create_model("resnet20_cc2")).name
        'resnet20_cc2'
        >>> specification_of(nn.Linear(8, 10)) is None
        True
    """
    specification = getattr(network, "specification", None)
    if isinstance(specification, Specification):
        without_head = any(getattr(module, "_without", None) == "head" for module in network.modules())
        return specification if specification.describes(network) and not without_head else None
    found = inferred(network)
    return None if found is None else Specification(found[0], *found[1], versions=_versions(found[0]))


def specification_in(run: Mapping[str, Any], where: str) -> Specification:
    """Return the specification in the `hyper_parameters` of a checkpoint.

    Args:
        run: the hyper-parameters, of checked types; see `check_fields`.
        where: the argument and its value, such as "checkpoint is best.ckpt", for messages.

    Raises:
        ValueError: the checkpoint has no specification, or one that this version does not know.
    """
    saved = run.get("specification")
    try:
        if saved is not None:
            return Specification.from_dict(saved)
        if "specification" not in run:  # an early checkpoint, which names a registered network
            sizes = {name: run[name] for name in ("num_classes", "in_chans", "img_size")}
            return Specification.parse(run["model"], **sizes)
    except ValueError as error:
        raise ValueError(f"{where}; {error}") from None
    raise ValueError(
        f"{where}; it does not say how its network, a {run['model']}, is built: it was trained as a module of the "
        "user's own, or one that was changed after it was built. Give the network, load(path, model=network), "
        "or what builds it, model='module:Class'"
    )


def conversion_of(network: nn.Module) -> dict[str, Any] | None:
    """Return the arguments with which `multipath` converted a network that no specification describes.

    They are plain values for a checkpoint. None is for other networks, for routers that a function makes, and for gates
    whose normalisation was changed in some routers.
    """
    values = _with_lists(getattr(network, "_conversion", None)) if isinstance(network, MultiPathNetwork) else None
    norms = {module.kind for module in network.modules() if isinstance(module, GateNorm)}
    if values is None or norms - {values["gate_norm"]}:  # set for some routers alone
        return None
    try:
        check_conversion(values)
    except ValueError:
        return None
    return values


def check_conversion(values: Any) -> None:
    """Check what `conversion_of` has returned, which may come from a file of unknown origin.

    Raises:
        ValueError: an argument is missing, unknown, or of another type or size than it can have.
    """
    if not isinstance(values, dict) or values.keys() != set(CONVERSION):
        raise ValueError(f"its conversion is {_short(values)}, expected a dict of {', '.join(CONVERSION)}")
    for name, value in values.items():
        expected, holds = _FIELDS[name]
        if not holds(value):
            raise ValueError(f"its conversion[{name!r}] is {_short(value)}, expected {expected}")


def _versions(source: str) -> dict[str, str]:
    versions = {"fastroute": _version.__version__, "torch": str(torch.__version__)}
    if source in sys.modules and source != "fastroute":
        versions[source] = str(sys.modules[source].__version__)
    return versions


def _with_lists(value: Any) -> Any:
    """Return a value with lists in place of tuples, and dicts in place of other mappings."""
    if isinstance(value, Mapping):
        return {key: _with_lists(item) for key, item in value.items()}
    return [_with_lists(item) for item in value] if isinstance(value, tuple | list) else value


def _sizes(value: Any) -> Iterator[int]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _sizes(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield abs(value)


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, dict):
        keys = all(isinstance(key, str) and len(key) <= 200 for key in value)
        return keys and depth < DEPTH and len(value) <= LONGEST and all(_is_plain(v, depth + 1) for v in value.values())
    if isinstance(value, list | tuple):
        return depth < DEPTH and len(value) <= LONGEST and all(_is_plain(item, depth + 1) for item in value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return abs(value) <= MOST
    return value is None or isinstance(value, bool) or (isinstance(value, str) and len(value) <= 1000)


def _is_int(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_texts(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and 1 <= len(value) <= LONGEST
        and all(isinstance(item, str) and len(item) <= 1000 for item in value)
    )


def _is_size(value: Any) -> bool:
    """Return whether a value is the size of an image or a sequence, of which two can be computed."""
    sizes = isinstance(value, list | tuple) and 2 <= len(value) <= 4 and all(_is_int(v, 1, MOST) for v in value)
    return sizes and math.prod(value) <= 2**26


def _short(value: Any) -> str:
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value)[:80] if plain else f"a {type(value).__name__}"


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "source": (f"one of {', '.join(SOURCES)}", lambda value: value in SOURCES),
    "name": ("a text", lambda value: isinstance(value, str) and len(value) <= 200),
    "num_classes": ("an int from 0 to 1,048,576 or None", lambda value: value is None or _is_int(value, 0, 2**20)),
    "in_chans": ("an int from 1 to 4,096", lambda value: _is_int(value, 1, 2**12)),
    "img_size": ("an int from 1 to 1,048,576 or None", lambda value: value is None or _is_int(value, 1, 2**20)),
    "kwargs": ("a dict of plain values", lambda value: isinstance(value, dict) and _is_plain(value)),
    "paths": (f"an int from 1 to {MAX_PATHS}", lambda value: _is_int(value, 1, MAX_PATHS)),
    "route_after": ("'auto' or a list of texts", lambda value: value == "auto" or _is_texts(value)),
    "routing": ("'cc', 'stitch' or None", lambda value: value in ("cc", "stitch", None)),
    "init": ("'fresh' or 'copy'", lambda value: value in ("fresh", "copy")),
    "input_size": ("a list of two to four sizes or None", lambda value: value is None or _is_size(value)),
    "gate_norm": ("'center', 'standardize' or None", lambda value: value in GATE_NORMS),
    "prior": ("'learned' or None", lambda value: value in PRIORS),
    "versions": ("a dict of texts", lambda value: isinstance(value, dict) and _is_plain(value)),
}
