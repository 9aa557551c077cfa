"""Shapes of the values in a network, and the images by which they are found."""

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import fx, nn

from fastroute._errors import first_line
from fastroute.models._modes import modes_kept


class _Shapes(fx.Interpreter):
    """Record the shape of each node's value, and whether the value of `watched` is overwritten later."""

    def __init__(self, module: fx.GraphModule, watched: fx.Node | None):
        super().__init__(module)
        self.watched, self.value = watched, None

    def fetch_args_kwargs_from_env(self, n: fx.Node):
        """Pass mutable lists, since some modules write into theirs."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(_mutable(args)), _mutable(kwargs)

    def run_node(self, n: fx.Node):
        result = super().run_node(n)
        n.meta["shape"] = tuple(result.shape) if isinstance(result, torch.Tensor) else None
        if n is self.watched and n.meta["shape"] is not None:
            self.value, self.version = result, result._version
        return result

    def run(self, *args):
        super().run(*args)
        if self.value is not None:
            self.watched.meta["overwritten"] = self.value._version != self.version


def _mutable(value):
    """Convert fx's immutable lists and dicts to mutable ones."""
    if isinstance(value, list | tuple):
        items = [_mutable(item) for item in value]
        return items if isinstance(value, list) else type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return {key: _mutable(item) for key, item in value.items()} if isinstance(value, dict) else value


def shapes_of(
    model: nn.Module, graph: fx.Graph, input_size: Sequence[int], watched: fx.Node | None = None
) -> dict[fx.Node, tuple[int, ...] | None]:
    """Return the shape of each node's value for two images, None if it is not a tensor.

    `watched.meta["overwritten"]` is set to whether later nodes overwrite the value of `watched`.

    Computing two black images is faster than fake tensors, which import torch's compiler.
    """
    try:
        with torch.no_grad(), modes_kept(model):
            _Shapes(fx.GraphModule(model.eval(), graph), watched).run(like(model).new_zeros(2, *input_size))
    except Exception as error:  # a user's own network may raise anything
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"input_size is {tuple(input_size)}; model cannot take such images: {reason}; give input_size=(C, H, W) of "
            "those that it takes"
        ) from error
    return {node: node.meta["shape"] for node in graph.nodes}


def like(model: nn.Module) -> torch.Tensor:
    """Return a tensor of the network's device and dtype."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


def check_takes(network: nn.Module, name: str, in_chans: int, img_size: int, classes: int | None = None) -> int:
    """Check that a network returns logits of the right shape for a black image, and return their number.

    Args:
        network: any; its modes are kept.
        name: of the network, for messages.
        in_chans: channels of the image.
        img_size: its height and width.
        classes: the number of logits; None is any.

    Raises:
        ValueError: the network does not take such an image, or returns something else.
    """
    try:
        with torch.no_grad(), modes_kept(network):
            logits = network.eval()(like(network).new_zeros(1, in_chans, img_size, img_size))
    except Exception as error:  # a user's own network may raise anything
        size = f"{in_chans} × {img_size} × {img_size}"
        raise ValueError(f"img_size is {img_size}; {name} cannot take images of {size}: {first_line(error)}") from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[1] != (classes or logits.shape[1]):
        what = f"{(*logits.shape,)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"model is {name!r}; for an image it returns {what}, expected logits (1, {classes or 'classes'}), one for "
            "each class"
        )
    return logits.shape[1]


def channel_axes(
    model: nn.Module,
    graph: fx.Graph,
    input_size: Sequence[int],
    nodes: Iterable[fx.Node],
    shapes: Mapping[fx.Node, tuple[int, ...] | None],
) -> dict[fx.Node, int]:
    """Return the axis of the channels of each node's value: 1, or the last one of tokens and of maps (N, H, W, C).

    In doubt, larger images tell the axis that keeps its size. A network may refuse them; then three axes are those of
    tokens, and of four axes two that are equal for square images are those of the image.

    Args:
        shapes: of the nodes' values for images of `input_size`.
    """
    axes, doubtful = {}, []
    for node in nodes:
        shape = shapes[node]
        axes[node] = len(shape) - 1 if len(shape) == 3 else 1
        if (len(shape) == 3 and len(input_size) == 2) or (len(shape) == 4 and shape[1] == shape[2]):
            doubtful.append(node)
    if not doubtful:
        return axes
    for node in graph.nodes:
        node.meta.pop("shape", None)
    with contextlib.suppress(ValueError):
        shapes_of(model, graph, [input_size[0], *(size + 32 for size in input_size[1:])])
    for node in doubtful:
        shape, larger = shapes[node], node.meta.get("shape") or ()
        kept = [axis for axis in (1, len(shape) - 1) if axis < len(larger) and larger[axis] == shape[axis]]
        if len(kept) == 1:
            [axes[node]] = kept
        elif len(shape) == 4 and shape[2] != shape[3]:
            axes[node] = 3
    return axes


def default_input_size(model: nn.Module) -> tuple[int, ...]:
    """Return the size of images that a network takes: that of timm's configuration, unless it was built for others.

    Raises:
        ValueError: there is no such configuration, and no 2-D convolution.
    """
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    channels = next((module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    known = [tuple(config["input_size"])] if "input_size" in config else []
    if channels is not None:
        height, width = known[0][1:] if known else (224, 224)
        known.append((channels, height, width))
        patches = getattr(getattr(model, "patch_embed", getattr(model, "stem", None)), "img_size", None)
        if isinstance(patches, tuple) and len(patches) == 2:
            known.append((channels, *patches))
    if not known:
        raise ValueError("input_size is None; it must be given for a model without 2-D convolutions")
    known = list(dict.fromkeys(known))
    for size in known if len(known) > 1 else ():  # timm's configuration does not follow in_chans and img_size
        with contextlib.suppress(Exception), torch.no_grad(), modes_kept(model):
            model.eval()(like(model).new_zeros(2, *size))
            return size
    return known[0]
