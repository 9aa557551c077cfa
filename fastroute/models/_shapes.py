"""Shapes of the values in a network, and the images by which they are found."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from fastroute._errors import first_line
from fastroute._random import generators_seeded
from fastroute.models._modes import modes_kept

CHANNELS_FIRST = (_ConvNd, _BatchNorm, nn.GroupNorm, _MaxPoolNd, _AvgPoolNd, _AdaptiveMaxPoolNd, _AdaptiveAvgPoolNd)
CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.MultiheadAttention, nn.RNNBase)


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
        result = super().run(*args)
        if self.value is not None:
            self.watched.meta["overwritten"] |= self.value._version != self.version
        return result


def _mutable(value):
    """Convert fx's immutable lists and dicts to mutable ones."""
    if isinstance(value, list | tuple):
        items = [_mutable(item) for item in value]
        return items if isinstance(value, list) else type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return {key: _mutable(item) for key, item in value.items()} if isinstance(value, dict) else value


@contextlib.contextmanager
def on_trial(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a copy of a network in evaluation mode, without gradients: its first images may initialise a layer.

    A network that cannot be copied is yielded itself. Modules that a copy shares with the network get their modes back.
    """
    with torch.no_grad(), modes_kept(model):
        with contextlib.suppress(Exception):  # a user's own module may refuse in any way
            model = copy.deepcopy(model)
        yield model.eval()


def random_images(model: nn.Module, input_size: Sequence[int]) -> torch.Tensor:
    """Return two images of random values from 0 to 1, always the same, on the network's device and of its dtype."""
    images = torch.rand(2, *input_size, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return images.to(like(model))


def shapes_of(
    model: nn.Module, graph: fx.Graph, input_size: Sequence[int], watched: fx.Node | None = None, check: bool = False
) -> dict[fx.Node, tuple[int, ...] | None]:
    """Return the shape of each node's value for two images, None if it is not a tensor.

    `watched.meta["overwritten"]` is set to whether later nodes overwrite the value of `watched`.

    Computing two images is faster than fake tensors, which import torch's compiler.

    Args:
        check: whether to raise ValueError where the graph returns something else than the network.
    """
    images = random_images(model, input_size)
    if watched is not None:
        watched.meta["overwritten"] = False
    gpus = [images.device.index] if images.is_cuda else []

    def compute(forward: Callable[[torch.Tensor], object]) -> object:
        with generators_seeded(0, gpus):
            return forward(images.clone())

    try:
        with on_trial(model) as trial:
            shapes = _Shapes(fx.GraphModule(trial, graph), watched)
            before = compute(trial) if check else None
            result = compute(shapes.run)
            after = compute(trial) if check else None
            if watched is not None and any(map(_draws_in_place, trial.modules())):
                trial.train()
                with contextlib.suppress(Exception):  # batch norm refuses a single value
                    compute(shapes.run)
    except Exception as error:  # a user's own network may raise anything
        raise ValueError(
            f"input_size is {tuple(input_size)}; model cannot take such images: {first_line(error)}; give "
            "input_size=(C, H, W) of those that it takes"
        ) from error
    # A network that itself returns something else every time cannot be compared.
    if check and _close(before, after) and not _close(result, after):
        raise ValueError(
            f"model is a {type(model).__name__}, whose graph by torch.fx computes something else than its forward, as "
            "where the forward asks for the type of its input; move that part into a module of its own, behind or "
            "between the modules to cut at"
        )
    return {node: node.meta["shape"] for node in graph.nodes}


def _draws_in_place(module: nn.Module) -> bool:
    """Return whether a layer writes into its input in training alone."""
    return isinstance(module, _DropoutNd | nn.RReLU) and module.inplace


def _close(a: object, b: object) -> bool:
    """Return whether two results are equal but for rounding; those that are no tensors are not compared."""
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return True
    if a.shape != b.shape or a.is_meta:
        return a.shape == b.shape
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    most = b.abs().nan_to_num(0, 0, 0).max().item() if b.numel() else 0
    return torch.allclose(a, b, rtol=1e-2, atol=1e-3 * most, equal_nan=True)


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
        with on_trial(network) as trial:
            logits = trial(like(network).new_zeros(1, in_chans, img_size, img_size))
    except Exception as error:  # a user's own network may raise anything
        size = f"{in_chans} × {img_size} × {img_size}"
        raise ValueError(f"img_size is {img_size}; {name} cannot take images of {size}: {first_line(error)}") from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or logits.shape[1] != (classes or logits.shape[1]):
        raise ValueError(
            f"model is {name!r}; for an image it returns {described(logits)}, expected logits "
            f"(1, {classes or 'classes'}), one for each class"
        )
    return logits.shape[1]


def described(result: object) -> str:
    """Describe what a network returns: a tensor by its shape, and anything else by its type."""
    return str(tuple(result.shape)) if isinstance(result, torch.Tensor) else f"a {type(result).__name__}"


def channel_axes(
    model: nn.Module,
    graph: fx.Graph,
    input_size: Sequence[int],
    nodes: Iterable[fx.Node],
    shapes: Mapping[fx.Node, tuple[int, ...] | None],
) -> dict[fx.Node, int]:
    """Return the axis of the channels of each node's value: 1, or the last one of tokens and of maps (N, H, W, C).

    The channels keep their number when the images grow. So where one size of images leaves doubt, the network also
    computes images of twice the size. If it refuses those, or pools to a fixed size, then two of four axes that have
    the shape of the image are spatial; else the layer decides, if the node is one: channels come first after a
    convolution, last after a dense layer. Otherwise three axes are tokens (N, L, C).

    Args:
        shapes: of the nodes' values for images of `input_size`.
    """
    axes, doubtful = {}, []
    square = len(set(input_size[1:])) == 1
    for node in nodes:
        shape, like_images = shapes[node], []
        if len(shape) == 4 and len(input_size) == 3:
            like_images = [axis for axis in (1, 3) if _is_shaped_as(shape[2:] if axis == 1 else shape[1:3], input_size)]
        if len(shape) == 2 or like_images == [1]:
            axes[node] = 1
        elif like_images == [3] and not square:
            axes[node] = 3
        else:
            axes[node] = 3 if like_images == [3] else _axis_by_layer(model, node, len(shape))
            doubtful.append(node)
    if not doubtful:
        return axes
    for node in graph.nodes:
        node.meta.pop("shape", None)
    with contextlib.suppress(ValueError):
        shapes_of(model, graph, [input_size[0], *(2 * size for size in input_size[1:])])
    for node in doubtful:
        shape, larger = shapes[node], node.meta.get("shape") or ()
        kept = [axis for axis in (1, len(shape) - 1) if axis < len(larger) and larger[axis] == shape[axis]]
        if len(kept) == 1:
            [axes[node]] = kept
    return axes


def _is_shaped_as(map_size: Sequence[int], input_size: Sequence[int]) -> bool:
    return map_size[0] * input_size[2] == map_size[1] * input_size[1]


def _axis_by_layer(model: nn.Module, node: fx.Node, dims: int) -> int:
    """Return the axis of the channels of what a module returns, by its type or that of the last layer in a sequence."""
    layer = model.get_submodule(node.target) if node.op == "call_module" else None
    while isinstance(layer, nn.Sequential) and len(layer):
        layer = next((child for child in reversed(layer) if not isinstance(child, _DropoutNd | nn.ReLU)), None)
    if isinstance(layer, CHANNELS_FIRST):
        return 1
    return dims - 1 if isinstance(layer, CHANNELS_LAST) or dims == 3 else 1


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
        with contextlib.suppress(Exception), on_trial(model) as trial:
            trial(random_images(model, size))
            return size
    return known[0]
