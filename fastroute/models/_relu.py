"""Move the ReLU at the end of a block into the router behind it."""

from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from fastroute.models._tracing import CONSTANT, trace
from fastroute.nn.blocks import SEQUENTIAL

RELUS = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


def take_relu(models: Sequence[nn.Module], graph: fx.Graph, start: fx.Node, node: fx.Node) -> bool:
    """Remove from all networks the ReLU that ends the computation from `start` to a node.

    A ReLU before a final max-pool counts too: the maximum of ReLU(x) is the ReLU of the maximum of x, with the same
    gradients.

    Returns:
        whether there was one to remove.
    """
    targets = [other.target for other in graph.nodes if other.op == "call_module"]
    while node is not start and node.op == "call_module" and targets.count(node.target) == 1 and _takes_one(node):
        module = models[0].get_submodule(node.target)
        if type(module) is nn.MaxPool2d and not module.return_indices and not _altered(module):
            node = node.args[0]
            if isinstance(node, fx.Node) and len(node.users) == 1:
                continue
            return False
        without = [_without_relu(model.get_submodule(node.target)) for model in models]
        if any(module is None for module in without):
            return False
        for model, module in zip(models, without, strict=True):
            model.set_submodule(node.target, module)
        return True
    return False


def _takes_one(node: fx.Node) -> bool:
    """Return whether a module is called with one argument, as `_forward_graph` calls it."""
    return len(node.args) == 1 and not node.kwargs


def _altered(module: nn.Module) -> bool:
    """Return whether a hook, or a forward set on the instance, may read or change the module's result."""
    return "forward" in vars(module) or any(value for name, value in vars(module).items() if name.endswith("_hooks"))


def _without_relu(module: nn.Module) -> nn.Module | None:
    """Return the module without the ReLU in which its forward ends, with the same tensors by the same names.

    Return None if it does not end in a ReLU, or if that is unknown because torch.fx cannot trace the forward, or
    because a hook may read or change its result.
    """
    if _altered(module) or is_parametrized(module) or isinstance(module, fx.GraphModule | torch.jit.ScriptModule):
        return None
    if type(module) is nn.ReLU:
        return nn.Identity()
    if type(module).forward in SEQUENTIAL:
        return _without_relu_of(module, list(module._modules)[-1]) if module._modules else None
    graph = _forward_graph(module)
    if graph is None:
        return None
    output = graph.output_node()
    result, children = output.args[0], [node.target for node in graph.nodes if node.op == "call_module"]
    if result is not output.prev or not result.args:
        return None
    if result.op == "call_module":
        if not _takes_one(result):
            return None
        if children.count(result.target) == 1 and "." not in result.target:
            return _without_relu_of(module, result.target)
        last = module.get_submodule(result.target)
        is_relu = type(last) is nn.ReLU and not _altered(last)
    else:
        is_relu = result.target in RELUS
    # A function, or a module that is called before as well: replace the forward itself.
    if not is_relu or type(module).train is not nn.Module.train:
        return None
    output.args = (result.args[0],)
    graph.erase_node(result)
    forward = fx.Graph()  # without the tracer, which is not to be pickled
    forward.output(forward.graph_copy(graph, {}))
    without = fx.GraphModule(module, forward, type(module).__name__)
    return without if list(without.state_dict()) == list(module.state_dict()) else None


def _without_relu_of(module: nn.Module, name: str) -> nn.Module | None:
    child = _without_relu(module._modules[name])
    if child is None:
        return None
    without = shallow_copy(module)
    without._modules[name] = child
    return without


def _forward_graph(module: nn.Module) -> fx.Graph | None:
    """Return the graph of a module's forward, or None if the graph may compute something else; see `trace`.

    None too if the forward makes tensors or calls a function with a mode of its own, such as `F.dropout`: those would
    have to become buffers and submodules of the module.
    """
    traced = shallow_copy(module)
    traced._buffers = {name: None if value is None else value.clone() for name, value in module._buffers.items()}
    try:
        graph, _ = trace(traced, {""})
    except ValueError:
        return None
    made = any(name.startswith(CONSTANT) for name in vars(traced)) or traced._modules.keys() != module._modules.keys()
    return None if made else graph


def shallow_copy(module: nn.Module) -> nn.Module:
    """Return a module of the same parameters, buffers and children, each of which can be replaced."""
    new = object.__new__(type(module))  # `copy.copy` refuses modules whose parameters are computed from others
    new.__dict__ |= vars(module)
    for name in ("_parameters", "_buffers", "_modules"):
        setattr(new, name, dict(getattr(module, name)))
    return new
