"""The network of `fastroute train`: its options, and how to build it from them or from a checkpoint to resume."""

import ast
import contextlib
import copy
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from fastroute._defaults import MAX_PATHS
from fastroute._errors import first_line
from fastroute._extras import extra
from fastroute.cli.errors import escaped

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastroute.data import ImageDataModule
    from fastroute.models.specification import Specification

NETWORK = "Network"


def _option(*flags: str, **settings):
    return typer.Option(*flags, rich_help_panel=NETWORK, **settings)


@dataclass
class NetworkOptions:
    """The options that say which network to train."""

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[SPEC]",
            help="The network: one of `fastroute models`, timm:NAME, torchvision:NAME, or package.module:function.",
        ),
    ] = None
    more_kwargs: Annotated[list[str] | None, typer.Argument(metavar="[K=V]...", hidden=True)] = None
    pretrained: Annotated[bool, _option("--pretrained", help="Download the weights of timm or torchvision.")] = False
    pretrained_path: Annotated[
        Path | None,
        _option(
            help="A file of weights to start from, of timm, torchvision or a run (.safetensors, .pth, .ckpt). The "
            "classifier may be for other classes."
        ),
    ] = None
    model_kwargs: Annotated[
        list[str] | None, _option(metavar="K=V", help="Arguments of the network itself, such as drop_rate=0.1.")
    ] = None
    block: Annotated[
        Literal["basic", "split_attention", "selective_kernel"] | None,
        _option(help="Block of a ResNet for small images: two convolutions, or with timm, adaptive ones."),
    ] = None
    multipath: Annotated[
        int | None, _option(min=2, max=MAX_PATHS, help="Turn the network into one with this number of parallel paths.")
    ] = None
    route_after: Annotated[
        str,
        _option(
            help="With --multipath: modules to route after, such as layer1,layer2; auto: every change of resolution."
        ),
    ] = "auto"
    routing: Annotated[
        Literal["cc", "stitch", "none"],
        _option(help="With --multipath: cross-connections, cross-stitch units, or paths that meet only at the logits."),
    ] = "cc"
    init: Annotated[
        Literal["copy", "fresh"] | None,
        _option(
            help="With --multipath: start all paths from the same weights, or each from its own. (default: copy with "
            "pretrained weights, as in the run with --initial-checkpoint, or else fresh)"
        ),
    ] = None
    gate_norm: Annotated[
        Literal["center", "standardize"] | None,
        _option(help="Normalise the scores of the gates over the batch (Eq. 4.11). (default: do not)"),
    ] = None
    gate_prior: Annotated[
        Literal["learned"] | None,
        _option(help="With --gate-norm: gates are posteriors with learned priors (Eq. 4.18)."),
    ] = None


CUTTING = ("route_after", "routing", "init")
"""Options that need --multipath."""


def merge_arguments(options: NetworkOptions) -> None:
    """Treat words of the form K=V after `--model-kwargs` as its values, wherever the network's name stands.

    Raises:
        ValueError: two networks are named, or a word K=V has no `--model-kwargs` before it.
    """
    words = [word for word in (options.model, *(options.more_kwargs or [])) if word is not None]
    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        advice = f", and the folder of images by --data-dir {names[1]}" if os.path.isdir(names[1]) else ""
        raise ValueError(f"model is {names[0]!r}, and {names[1]!r} too; name one network{advice}")
    kwargs = [*(options.model_kwargs or []), *(word for word in words if "=" in word)]
    if kwargs and not options.model_kwargs:
        raise ValueError(f"{kwargs[0]!r} is no network; give arguments of the network by --model-kwargs {kwargs[0]}")
    options.model, options.model_kwargs = names[0] if names else None, kwargs or None


def specification(options: NetworkOptions, resume: Path | None) -> "Specification":
    """Return the network that the options describe, or that of the checkpoint to resume if they do not differ from it.

    Args:
        options: of the command.
        resume: the checkpoint, if any.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: options contradict each other, or there is no such network.
    """
    from fastroute.models.specification import Specification, specification_in

    if resume is not None and options.multipath is None and not options.model_kwargs:
        from fastroute.training.checkpoints import read_checkpoint

        run = read_checkpoint(resume, command="train")["hyper_parameters"]
        if "specification" in run:
            saved = specification_in(run, f"resume is {resume}")
            if saved.source == "function" and options.model != saved.text:
                raise ValueError(
                    f"resume is {resume}; its network is built by {saved.name}, and your own code is imported only if "
                    f"you name it: fastroute train {saved.name} --resume …"
                )
            gates = options.gate_norm in (None, saved.gate_norm) and options.gate_prior in (None, saved.prior)
            if options.model in (None, saved.text) and not _cut(options) and gates:
                return saved
    if options.model is None:
        raise ValueError("model is missing; name a network, or a recipe with --config")
    given = Specification.parse(options.model, kwargs=_kwargs(options.model_kwargs or []))
    given = replace(given, gate_norm=options.gate_norm, prior=options.gate_prior)
    if options.pretrained and options.pretrained_path is not None:
        raise ValueError(f"pretrained is True, and pretrained_path is {options.pretrained_path}; give only one of them")
    if options.multipath is None:
        if cut := _cut(options):
            raise ValueError(f"{cut[0]} is {getattr(options, cut[0])!r}; it needs --multipath with the number of paths")
        return given
    cuts = [name for name in re.split(r"[\s,]+", options.route_after) if name]
    if not cuts:
        raise ValueError(f"route_after is {options.route_after!r}; it must be auto, or modules such as layer1,layer2")
    starts = options.pretrained or options.pretrained_path is not None
    if options.init is None and resume is None and not starts:
        starts = _started_as_copies(getattr(options, "initial_checkpoint", None))
    return replace(
        given,
        paths=options.multipath,
        route_after="auto" if cuts == ["auto"] else tuple(cuts),
        routing=None if options.routing == "none" else options.routing,
        init=options.init or ("copy" if starts else "fresh"),
    )


def _started_as_copies(path: Path | None) -> bool:
    """Return whether weights are of a network whose paths started as copies, and so fit no other."""
    from fastroute.models.weights import is_scale, read_weights

    with contextlib.suppress(ValueError, OSError):  # it is read again, for its own message
        return path is not None and any(map(is_scale, read_weights(path)))
    return False


def _cut(options: NetworkOptions) -> list[str]:
    """Return the options of `CUTTING` that differ from their defaults."""
    return [name for name in CUTTING if getattr(options, name) != getattr(NetworkOptions, name)]


def write_flags(given: "Specification", options: NetworkOptions) -> None:
    """Set the options of the network to those in the checkpoints of the run, from which a resumed run takes them.

    Args:
        given: the network.
        options: changed in place.
    """
    options.model = given.text
    options.model_kwargs = [f"{name}={value}" for name, value in given.kwargs.items()] or None
    options.gate_norm, options.gate_prior = given.gate_norm, given.prior
    if given.paths > 1:
        cuts = [given.route_after] if isinstance(given.route_after, str) else given.route_after
        options.multipath, options.route_after = given.paths, ",".join(cuts)
        options.routing, options.init = given.routing or "none", given.init


def network(
    given: "Specification",
    options: NetworkOptions,
    data: "ImageDataModule",
    num_classes: int | None,
    resume: Path | None,
    console: Console,
) -> "nn.Module":
    """Build the network for the images and classes of the data, with the weights that the options ask for.

    Args:
        given: the network.
        options: of which `pretrained` and `pretrained_path` count.
        data: of the run, set up.
        num_classes: logits; None is the number of the data's classes.
        resume: the checkpoint to resume, if any; its weights then take the place of pretrained ones.
        console: prints what is done to pretrained weights.

    Returns:
        the network, on the CPU.

    Raises:
        ValueError: it cannot be built, or does not take such images.
        FileNotFoundError: there is no such file of weights.
    """
    from fastroute.models._shapes import check_takes
    from fastroute.training.distributed import local_rank_zero_first

    if resume is not None and given.num_classes is not None:  # the checkpoint's own
        sizes = {"in_chans": data.in_chans, "img_size": data.img_size}
    else:
        sizes = {"num_classes": num_classes or data.num_classes}
        sizes |= {"in_chans": data.in_chans, "img_size": data.img_size}
    starts = resume is None  # a resumed run has its own weights
    with local_rank_zero_first() if options.pretrained and starts else contextlib.nullcontext():
        built = given.build(
            **sizes,
            pretrained=options.pretrained and starts,
            pretrained_path=options.pretrained_path if starts else None,
            imports=True,
            say=partial(_say, console),
        )
    classes = sizes.get("num_classes", given.num_classes)
    check_takes(built, str(given), data.in_chans, data.img_size, classes)
    return built


def pretrained_levels(given: "Specification") -> tuple[list[float], list[float]] | None:
    """Return the mean and standard deviation of images that downloaded weights were trained with.

    Args:
        given: the network.

    Returns:
        both, for each channel of images from 0 to 1; None if they are not known.
    """
    from fastroute.data.module import IMAGENET_MEAN, IMAGENET_STD

    if given.source == "torchvision":
        return [value / 255 for value in IMAGENET_MEAN], [value / 255 for value in IMAGENET_STD]
    if given.source != "timm":
        return None
    with extra("timm", f"model {given.text!r}"):
        import timm
    try:
        config = timm.get_pretrained_cfg(given.name)
    except RuntimeError:  # an unknown tag; building the network raises a clear error
        config = None
    return None if config is None else (list(config.mean), list(config.std))


def _say(console: Console, sentence: str) -> None:
    console.print(escaped(sentence), soft_wrap=True, highlight=False)


def usable_channels_last(
    built: "nn.Module",
    name: str,
    wish: bool | None,
    device: "torch.device",
    in_chans: int,
    img_size: int,
    console: Console,
) -> bool:
    """Return whether to compute in channels_last.

    The default is to do so on a CPU, where it is faster, unless the network cannot, such as one that uses
    `Tensor.view`.

    Args:
        built: the network, which takes such images in NCHW.
        name: of the network, for messages.
        wish: `--channels-last`; None for the default.
        device: on which the network will compute.
        in_chans: channels of the images.
        img_size: their height and width.
        console: prints why the default is not channels_last.

    Raises:
        ValueError: `wish` is True, and the network cannot take such images.
    """
    if not (device.type == "cpu" if wish is None else wish):
        return False
    reason = _layout_error(built, in_chans, img_size)
    if reason is None:
        return True
    if wish:
        raise ValueError(
            f"channels_last is True; {name} cannot compute in channels_last: {reason}; use --no-channels-last, or "
            "reshape or flatten in its forward in place of view"
        )
    _say(console, f"{name} cannot compute in channels_last, so it computes in NCHW: {reason}")
    return False


def _layout_error(built: "nn.Module", in_chans: int, img_size: int) -> str | None:
    """Return the error that a network raises in channels_last and not in NCHW, in training or evaluation, or None."""
    import torch

    from fastroute.models._shapes import like

    def error(network: "nn.Module", layout: torch.memory_format) -> str | None:
        images = like(network).new_zeros(2, in_chans, img_size, img_size)
        try:
            # torch.fx prints a traceback of errors in what it has traced
            with contextlib.redirect_stderr(io.StringIO()), torch.no_grad(), torch.random.fork_rng(devices=()):
                network.to(memory_format=layout)(images.contiguous(memory_format=layout))
        except Exception as error:  # a user's own network may raise anything
            return first_line(error).rstrip(".")
        return None

    try:
        network = copy.deepcopy(built)
    except RuntimeError:  # of weights that are computed from others, as by pruning
        return None
    for training in (True, False):
        reason = error(network.train(training), torch.channels_last)
        if reason is not None and error(network, torch.contiguous_format) is None:
            return reason
    return None


def _kwargs(words: Sequence[str]) -> dict[str, Any]:
    kwargs = {}
    for word in words:
        for item in re.split(r"\s+(?=[^\W\d]\w*=)", word.strip()):
            name, equals, value = item.partition("=")
            if not equals or not name.isidentifier():
                raise ValueError(f"model_kwargs has {item!r}; each must be K=V, such as drop_rate=0.1")
            if name in kwargs:
                raise ValueError(f"model_kwargs has {name} twice; keep one")
            kwargs[name] = _value(value)
    return kwargs


def _value(text: str) -> Any:
    """Parse a Python literal, or true, false or none; any other text is a string."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
