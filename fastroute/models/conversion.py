"""Convert any network to parallel paths with routers (§3.2, §3.4.3), by torch.fx."""

import contextlib
import copy
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches

import torch
from torch import fx, nn

from fastroute._errors import first_line, kind
from fastroute._plain import plain
from fastroute.models._relu import shallow_copy, take_relu
from fastroute.models._shapes import channel_axes, default_input_size, like, shapes_of
from fastroute.models._tracing import trace
from fastroute.models.sources import without_auxiliary_heads
from fastroute.models.specification import CONVERSION, remember, specification_of
from fastroute.models.weights import SCALE, path_names, without_decay
from fastroute.nn import (
    CrossConnection,
    CrossStitch,
    FusedSequential,
    MultiPathNetwork,
    ParallelPaths,
    exact_convolutions,
    set_gate_norm,
)
from fastroute.nn.blocks import SEQUENTIAL
from fastroute.ops._paths import MAX_PATHS, check_integers, check_numbers

INPUT = "input"
ROUTERS = {"cc": CrossConnection, "stitch": lambda channels, m, n: CrossStitch(m, n)}


def multipath(
    model: nn.Module,
    paths: int,
    route_after: Sequence[str] | str = "auto",
    routing: str | Callable[[int, int, int], nn.Module] | None = "cc",
    *,
    init: str = "fresh",
    noise: float = 0.01,
    input_size: Sequence[int] | None = None,
    gate_norm: str | None = None,
    prior: str | None = None,
) -> MultiPathNetwork:
    """Convert a network to parallel paths, with a router after each of the named modules.

    The network is cut behind each of these modules. All paths share the part before the first cut, and a one-to-many
    router opens them there. Each path has its own copy of the rest, with a router to all paths at every other cut. The
    logits of the paths are averaged. `model` itself is not changed.

    The layers of the new network are the parts and the routers in turn. The first part is "stem" and the last "head".
    Any other part has the name of the module that ends it, with "_" for ".", and its router this name and "_router":

        stem.0.conv1.weight                  the shared part, its modules by their names in `model`
        maxpool_router.w1                    the first router, after the module `maxpool`
        layer1.1.0.conv1.weight              path 1 of a part that is one module, `layer1`: the names within it
        head.1.fc.weight                     path 1 of a part of several modules: their names in `model`

    Args:
        model: any network from one tensor of images to one of logits. torch.fx must be able to trace the forward of
            the modules around the cuts; all other modules may do anything.
        paths: the number of parallel paths, 2 to 8.
        route_after: names of modules, as in `model.named_modules()`, in a list or joined by commas, such that the rest
            of the network needs only their output; "input" stands for the images. Tokens (N, L, C) of a transformer are
            routed by their channels C, and so are maps (N, H, W, C), as Swin has them: the channels are the axis whose
            size does not depend on that of the images. "auto" cuts at every change of resolution, behind the last
            module at each resolution but the images' own; it looks only into modules of type `nn.Sequential`.
        routing: "cc", cross-connections; "stitch", cross-stitch units; a function from (channels, in_paths,
            out_paths) to a module from and to lists of tensors, such as `partial(CrossConnection, gate_channels=8)`;
            or None, paths that meet only at the first cut and the logits.
        init: "fresh" is for training from scratch: the first path has the weights of `model`, and every other path the
            same weights with rows and columns in a random order, which equals another draw of the initialiser. Vectors,
            such as biases, stay as they are, since their entries may have meanings of their own. "copy" is for
            pretrained networks: every path has the weights of `model`, with `noise` on all but the first path's. A
            one-to-many router with even gates gives each path 1/n of its input, so "cc" then multiplies that input by
            n, and without noise the new network at first computes the same as `model`, unless gate_norm="standardize"
            spreads the gates. The state dict has this factor, so a network that is to load it must be built with
            init="copy" too. Both leave parameters that are frozen (`requires_grad` is False) as they are.
        noise: for init="copy", the standard deviation of the noise on each parameter of two or more axes, such as the
            weights of convolutions and dense layers, relative to that of its values.
        input_size: (channels, height, width) of the images by which the channels at each cut are found, or (channels,
            length) of sequences. The default is that of timm's `pretrained_cfg`, if the network takes such images, or
            else 224 × 224, or the size of a transformer's `patch_embed`, with the channels of the first convolution.
        gate_norm, prior: how the routers normalise their gates; see `nn.CrossConnection`.

    Where a part ends in a ReLU that can be told apart, the cross-connection behind it applies the ReLU
    (`activation="relu"`), and the part does not. Outputs, gradients and the names in the state dict do not change. A
    block whose forward ends in a ReLU that is a function, or a module called before as well, becomes a graph of its
    calls, in which numbers among its attributes keep their values.

    Returns:
        a `MultiPathNetwork`: `forward(x)` → logits; `forward(x, return_routing=True)` → (logits, {name: Routing}).

    Raises:
        TypeError: paths is no integer; input_size is no tuple; route_after are no names; routing is a module instead of
            a function; model is not a module, or a wrapper: compiled, scripted, or for several devices.
        ValueError: an argument is out of its range; a name is unknown, or named twice; a module is called more than
            once or never, or does not return one tensor (N, C), (N, C, H, W) or (N, L, C); more than its output reaches
            the rest of the network; torch.fx cannot trace the network; or the forward of the modules around the cuts
            does what a graph cannot keep, such as another computation in training, a part without gradients or
            autocast, changes of a buffer, or a random choice in Python; one of these modules has a method `train` of
            its own; or `model` itself has forward hooks or a forward set on the instance.

    Example:
        >>> model = multipath(torchvision.models.resnet18(), 2, ["maxpool", "layer1", "layer2", "layer3", "layer4"])
        >>> logits, routing = model(torch.randn(2, 3, 224, 224), return_routing=True)
        >>> list(routing)
        ['maxpool_router', 'layer1_router', 'layer2_router', 'layer3_router', 'layer4_router']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {kind(model)}; it must be a module, such as create_model('resnet18')")
    _check_is_plain(model)
    if any(isinstance(module, MultiPathNetwork) for module in model.modules()):
        raise ValueError(
            f"model is a {type(model).__name__} with parallel paths; give a network of one, or leave multipath out"
        )
    check_integers(paths=paths)
    if not isinstance(route_after, Iterable):
        raise TypeError(f"route_after is {route_after!r}; it must be 'auto' or the names of modules, in a list")
    if isinstance(routing, nn.Module):
        raise TypeError(
            f"routing is a {type(routing).__name__}; it must be a function from (channels, in_paths, out_paths) to a "
            "module, such as the class itself"
        )
    if not isinstance(input_size, Iterable | None):
        raise TypeError(f"input_size is {input_size!r}; it must be a tuple such as (3, 224, 224)")
    paths, noise = plain(paths), plain(noise)
    if not 2 <= paths <= MAX_PATHS:
        raise ValueError(f"paths is {paths}; it must be 2 to {MAX_PATHS}")
    if routing is not None and not callable(routing) and routing not in ROUTERS:
        raise ValueError(f"routing is {routing!r}; it must be {', '.join(map(repr, ROUTERS))}, None or a function")
    if init not in ("fresh", "copy"):
        raise ValueError(f"init is {init!r}; it must be 'fresh' or 'copy'")
    check_numbers(noise=noise)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise}; it must be at least 0, and finite")

    try:
        model = copy.deepcopy(model)
    except RuntimeError as error:  # of tensors that are computed from others, as in pruned networks
        raise ValueError(
            f"model is a {type(model).__name__} that cannot be copied: {first_line(error)}. Make weights that are "
            "computed, by pruning or the old weight_norm, plain parameters first (torch.nn.utils.prune.remove, "
            "remove_weight_norm)"
        ) from error
    model = without_auxiliary_heads(model)
    undecayed = without_decay(model)
    specification = specification_of(model)
    input_size = default_input_size(model) if input_size is None else tuple(map(plain, input_size))
    if isinstance(route_after, str):  # as on the command line
        route_after = [name.strip() for name in route_after.split(",") if name.strip()]
        if route_after == ["auto"]:
            route_after = _changes_of_resolution(model, input_size)
    graph, cuts = _cut(model, route_after)
    first = next(iter(cuts.values()))
    if routing is None:  # the paths start from one and the same tensor
        _compute_out_of_place(model, graph, first)
    shapes = shapes_of(model, graph, input_size, first, check=True)
    for name, node in cuts.items():
        if len(shapes[node] or ()) not in (2, 3, 4, 5):
            raise ValueError(
                f"route_after names {name!r}, which returns {shapes[node] or 'no tensor'}; "
                "routing takes a tensor (N, C), (N, C, H, W), or (N, L, C) of L tokens"
            )

    axes = channel_axes(model, graph, input_size, cuts.values(), shapes)
    output = graph.output_node().args[0]
    if not isinstance(output, fx.Node) or shapes[output] is None:
        raise ValueError(f"model is a {type(model).__name__} that returns {output}; it must return one tensor")

    scale = paths if init == "copy" and routing == "cc" else 1
    copies = [model, *(_reseeded(model, init, noise) for _ in range(paths - 1))]
    device = next((parameter.device for parameter in model.parameters()), None)
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else None
    layers, origins, start = OrderedDict(), {}, graph.find_nodes(op="placeholder")[0]
    width, own, last_before = 1, False, False
    for name, end in cuts.items():
        part = "stem" if width == 1 else name
        last = last_before, routing is not None and axes[end] != 1
        router = None
        if routing is not None:
            make = routing if callable(routing) else ROUTERS[routing]
            router = make(shapes[end][axes[end]], width, paths).to(device, dtype)
            if not hasattr(router, "out_paths"):  # `forward_head` asks for it
                router.out_paths = paths
            if isinstance(router, CrossConnection) and router.activation is None:
                router.activation = "relu" if take_relu(copies, graph, start, end) else None
        if end is not start or scale > 1:
            sources = copies[:width]
            if width == 1 and _weights_on_both_sides(model, graph, end):
                sources = [copy.deepcopy(model)]  # or path 0 alone would share them with the stem
            parts, origin = _parts(sources, graph, start, end, scale, own, last)
            origins[_add(layers, part, parts)] = origin
        if router is not None:
            _add(layers, f"{name}_router", router)
        start, width, scale, last_before = end, paths, 1, last[1]
        own = routing is None and end is first and first.meta["overwritten"]
    parts, origin = _parts(copies, graph, start, output, own=own, last=(last_before, False))
    origins[_add(layers, "head", parts)] = origin
    network = MultiPathNetwork(layers)
    network.origins = origins
    network.has_inner_routers = bool(network._inner_routers())
    network.undecayed = frozenset(name for name, own in (path_names(network) or {}).items() if own in undecayed)
    if gate_norm is not None or prior is not None:
        set_gate_norm(network, gate_norm, prior)
    values = paths, tuple(cuts), routing, init, input_size, gate_norm, prior
    arguments = dict(zip(CONVERSION, values, strict=True))
    if specification is None:
        network._conversion = None if callable(routing) else arguments
    elif specification.paths == 1:
        specification = replace(specification, **arguments)
    remember(network, specification)
    return exact_convolutions(network if model.training else network.eval())


def _add(layers: dict[str, nn.Module], name: str, layer: nn.Module) -> str:
    name = name.replace(".", "_")
    while name in layers:
        name += "_"
    layers[name] = layer
    return name


def _ancestors(names: Iterable[str]) -> set[str]:
    parts = [name.split(".") for name in names]
    return {".".join(part[:i]) for part in parts for i in range(len(part))}


def _cut(model: nn.Module, route_after: Sequence[str]) -> tuple[fx.Graph, dict[str, fx.Node]]:
    """Check the names, and return the graph and the node of each name in the order of computation."""
    names, known = list(route_after), dict(model.named_modules())
    if not names:
        raise ValueError("route_after is empty; it must name at least one module")
    for name in names:
        if name == "" or (name not in known and name != INPUT):
            near = get_close_matches(name, filter(None, known), n=3)
            children = ", ".join([child for child, _ in model.named_children()][:10])
            hint = f"did you mean {', '.join(near)}?" if near else f"those of the network itself are {children}"
            raise ValueError(f"route_after names {name!r}; there is no such module: {hint}")
        if names.count(name) > 1:
            raise ValueError(f"route_after names {name!r} {names.count(name)} times")

    graph, results = trace(model, _ancestors(names))
    order = {node: i for i, node in enumerate(graph.nodes)}
    crossing = _crossing(graph)
    nodes = {}
    for name in names:
        if name not in known:
            nodes[name] = graph.find_nodes(op="placeholder")[0]
            continue
        calls = results.get(name, [])
        if len(calls) != 1:
            raise ValueError(f"route_after names {name!r}, which is called {len(calls)} times; it must be called once")
        if calls[0] is None:
            raise ValueError(f"route_after names {name!r}, which does not return one tensor")
        others = crossing[calls[0]] - {calls[0]}
        if others:
            other = next(iter(others))
            raise ValueError(
                f"route_after names {name!r}, but the rest of the network needs more than its output: "
                f"that of {str(other.target)!r} as well"
            )
        nodes[name] = calls[0]
    for name, node in nodes.items():
        same = next(other for other in names if nodes[other] is node)
        if same != name:
            raise ValueError(f"route_after names {same!r} and {name!r}, which return the same tensor; leave one out")
    return graph, dict(sorted(nodes.items(), key=lambda item: order[item[1]]))


def _crossing(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """Return for each node the values computed so far that later nodes take, without parameters."""
    last = {node: max((user for user in node.users), default=node) for node in graph.nodes}
    crossing, live = {}, set()
    for node in graph.nodes:
        live = {value for value in live if last[value] > node}
        if node.op != "get_attr" and last[node] > node:
            live.add(node)
        crossing[node] = live
    return crossing


def _check_is_plain(model: nn.Module) -> None:
    """Raise TypeError for wrappers that torch.fx cannot trace, and ValueError for layers without weights yet."""
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"model is a {name}; convert the module that it was made of, and script or trace the result")
    if hasattr(model, "_orig_mod"):
        raise TypeError(f"model is a {name}; convert model._orig_mod, and compile the result")
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise TypeError(f"model is a {name}; convert model.module, and wrap the result")
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in model.parameters()):
        raise ValueError(f"model is a {name} with lazy layers that have no weights yet; call it once with images")
    if "forward" in vars(model) or model._forward_hooks or model._forward_pre_hooks:
        what, advice = "forward hooks", "convert nn.Sequential(model), whose modules have names such as '0.layer1'"
        if "forward" in vars(model):
            what, advice = "a forward set on the instance", "make it the forward of a subclass"
        raise ValueError(
            f"model is a {name} with {what}, which torch.fx does not follow in the network itself: take them away, or "
            f"{advice}"
        )


def _changes_of_resolution(model: nn.Module, input_size: Sequence[int]) -> list[str]:
    """Return the last module behind which the network can be cut at each resolution, except the images' own."""
    plain = {""}  # the network itself, and each nn.Sequential in a plain one
    for name, module in model.named_modules():
        if type(module).forward in SEQUENTIAL and name.rpartition(".")[0] in plain:
            plain.add(name)
    graph, results = trace(model, plain)
    shapes, crossing = shapes_of(model, graph, input_size), _crossing(graph)
    candidates = [node for nodes in results.values() for node in nodes if node and len(shapes[node] or ()) in (3, 4, 5)]
    axes = channel_axes(model, graph, input_size, candidates, shapes)
    last, others = {}, {}
    for name, nodes in results.items():  # an nn.Sequential comes after what is in it, and its name is the shorter
        node = nodes[0]
        if len(nodes) != 1 or node not in axes or crossing[node] - {node}:
            continue
        if len(shapes[node]) == 3 and axes[node] == 2:
            others.setdefault(shapes[node], []).append(name)
            continue
        resolution = shapes[node][2:] if axes[node] == 1 else shapes[node][1:-1]
        if resolution != tuple(input_size[1:]) and set(resolution) != {1}:
            last[resolution] = name
    if len(last) < 2 and others:  # of a transformer, whose tokens keep their number
        names = ",".join(_blocks(model, max(others.values(), key=len)))
        raise ValueError(
            f"route_after is 'auto', which cuts where the resolution of maps changes, and {type(model).__name__} has "
            f"no such maps; name modules to cut behind, such as {names}"
        )
    if not last:
        stages = [name for name, module in model.named_modules() if name and isinstance(module, nn.Sequential)]
        depth = min((name.count(".") for name in stages), default=0)
        known = ",".join([name for name in stages if name.count(".") == depth][:4])
        raise ValueError(
            "route_after is 'auto', which looks into nn.Sequential alone, and found no module behind which the "
            f"resolution changes; name some{f', such as {known}' if known else ''}"
        )
    return list(last.values())


def _blocks(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return three modules behind which a network of equal blocks can be cut, at its quarters.

    If fewer are known, those of its longest list of modules are taken, provided that it can be cut there.
    """

    def quarters(names: Sequence[str]) -> list[str]:
        return [names[i] for i in sorted({len(names) * i // 4 for i in (1, 2, 3)})]

    lists = [
        [f"{name}.{child}" for child, _ in module.named_children()]
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList)
    ]
    longest = max(lists, key=len, default=[])
    if len(names) < 3 <= len(longest):
        with contextlib.suppress(ValueError):
            _cut(model, quarters(longest))
            return quarters(longest)
    return quarters(names)


def _parts(models: Sequence[nn.Module], *arguments, **options) -> tuple[ParallelPaths, str]:
    """Return a part of each of the networks, and its name in them if it is one module, else ""."""
    parts = [_part(model, *arguments, **options) for model in models]
    names = {module: name for name, module in models[0].named_modules()}
    return ParallelPaths(parts), names.get(parts[0], "")


def _part(
    model: nn.Module,
    graph: fx.Graph,
    start: fx.Node,
    end: fx.Node,
    scale: int = 1,
    own: bool = False,
    last: tuple[bool, bool] = (False, False),
) -> nn.Module:
    """Return the computation from one node to another, with the modules of `model`.

    Args:
        scale: factor of the result.
        own: whether to copy the input, which the part may overwrite.
        last: whether the channels of the input and of the output come last, as in tokens (N, L, C); routers take and
            return (N, C, L).
    """
    order = list(graph.nodes)
    nodes = [node for node in order[order.index(start) + 1 : order.index(end) + 1] if node.op != "get_attr"]
    chain = all(
        node.op == "call_module" and node.args == (before,) and not node.kwargs
        for before, node in zip([start, *nodes], nodes, strict=False)
    )
    once = len({node.target for node in nodes}) == len(nodes)  # a module without weights is often called again
    chain = chain and once and scale == 1 and not own and not any(last)
    if chain and len(nodes) == 1:
        return model.get_submodule(nodes[0].target)
    if chain and not any("." in node.target for node in nodes):
        return FusedSequential(OrderedDict((node.target, model.get_submodule(node.target)) for node in nodes))

    part = fx.Graph()
    x = part.placeholder("x")
    if last[0]:
        x = part.call_method("movedim", (x, 1, -1))
    values = {start: part.call_method("clone", (x,)) if own else x}

    def value(node: fx.Node) -> fx.Node:
        if node not in values:  # a parameter that was first used before
            values[node] = part.node_copy(node)
        return values[node]

    for node in nodes:
        values[node] = part.node_copy(node, value)
    result = values[end]
    if last[1]:
        result = part.call_method("movedim", (result, -1, 1))
    if scale == 1:
        part.output(result)
        return fx.GraphModule(model, part)
    root = shallow_copy(model)  # without the factor in the other parts of `model`
    root._buffers[SCALE] = torch.tensor(float(scale), device=like(model).device)
    part.output(part.call_function(torch.mul, (result, part.get_attr(SCALE))))
    return fx.GraphModule(root, part)


def _weights_on_both_sides(model: nn.Module, graph: fx.Graph, cut: fx.Node) -> bool:
    """Return whether a parameter or buffer is used up to a node and again behind it, by itself or in a module."""
    tensors = {*model.parameters(), *model.buffers()}
    used = {True: set(), False: set()}
    for node in graph.nodes:
        if node.op == "call_module":
            module = model.get_submodule(node.target)
            used[node <= cut] |= {*module.parameters(), *module.buffers()}
        elif node.op == "get_attr" and (value := operator.attrgetter(node.target)(model)) in tensors:
            for user in node.users:
                used[user <= cut].add(value)
    return bool(used[True] & used[False])


def _compute_out_of_place(model: nn.Module, graph: fx.Graph, node: fx.Node) -> None:
    """Stop an in-place module from overwriting a node's value, which saves a copy of it.

    Only a module that alone takes the value and is called once is changed: elsewhere the network may rely on the
    overwritten value.
    """
    users = [(user.op, user.target) for user in node.users]
    if len(users) == 1 and users[0][0] == "call_module":
        target = users[0][1]
        module = model.get_submodule(target)
        if getattr(module, "inplace", False) and len(graph.find_nodes(op="call_module", target=target)) == 1:
            module.inplace = False


@torch.no_grad()
def _reseeded(model: nn.Module, init: str, noise: float) -> nn.Module:
    """Return a copy of the network with the rows and columns of its weights permuted, or with noise on them."""
    original, model = model, copy.deepcopy(model)
    buffers = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # such as fixed filters, or the encoding of positions
            continue
        if init == "copy":
            if noise and parameter.dim() > 1 and parameter.numel() > 1:
                parameter.add_(torch.randn_like(parameter) * (noise * parameter.std()))
            continue
        if parameter.dim() < 2:  # the bias of a spatial transformer or an LSTM has an order
            continue
        matrix = parameter.flatten(1)
        rows, columns = (torch.randperm(size, device=parameter.device) for size in matrix.shape)
        parameter.copy_(matrix.index_select(0, rows).index_select(1, columns).view_as(parameter))
        for vector, order in (("0._u", rows), ("0._v", columns)):  # the singular vectors of spectral_norm
            buffer = buffers.get(name.removesuffix("original") + vector)
            if name.endswith(".original") and buffer is not None and buffer.shape == order.shape:
                buffer.copy_(buffer[order])
    for old, new in zip(original.modules(), model.modules(), strict=True):
        if isinstance(old, nn.Embedding | nn.EmbeddingBag) and old.padding_idx is not None:
            new.weight[old.padding_idx] = old.weight[old.padding_idx]
    return model
