"""Trace networks by torch.fx."""

import contextlib
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastroute.models._modes import modes_kept

AUTOCAST = ("cpu", "cuda")


class _Tracer(fx.Tracer):
    """Trace into the modules of `expand`, keep all others whole, and record what each module returns."""

    def __init__(self, expand: set[str]):
        super().__init__()
        self.expand = expand
        self.results: dict[str, list] = {}

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """Trace only the images; all other arguments of the network keep their defaults."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.expand

    def create_node(self, *args, **kwargs) -> fx.Node:
        """Record the modes that a graph does not keep: gradients and autocast."""
        node = super().create_node(*args, **kwargs)
        node.meta["modes"] = torch.is_grad_enabled(), *map(torch.is_autocast_enabled, AUTOCAST)
        return node

    def call_module(self, m, forward, args, kwargs):
        result = super().call_module(m, forward, args, kwargs)
        self.results.setdefault(self.path_of_module(m), []).append(result)
        return result


def trace(model: nn.Module, expand: set[str]) -> tuple[fx.Graph, dict[str, list[fx.Node | None]]]:
    """Return the graph of the network, and the node that each module returned, None unless it is one tensor.

    Functional dropout becomes a module in `model`, since its `training` would be fixed by tracing.
    """
    graphs = []
    with modes_kept(model):
        for mode in (True, False):
            tracer = _Tracer(expand)
            try:
                graph = tracer.trace(model.train(mode))
            except Exception as error:  # a forward may do anything with a proxy
                raise ValueError(
                    f"model is a {type(model).__name__}, which torch.fx cannot trace: {type(error).__name__}: {error}"
                ) from error
            _use_dropout_modules(model, graph, mode)
            graphs.append(graph)
    if str(graphs[0]) != str(graphs[1]):
        raise ValueError(f"model is a {type(model).__name__}, whose forward in training is another than in evaluation")
    results = {
        name: [result.node if isinstance(result, fx.Proxy) else None for result in results]
        for name, results in tracer.results.items()
    }
    return graph, results


def _use_dropout_modules(model: nn.Module, graph: fx.Graph, mode: bool) -> None:
    for i, node in enumerate(graph.find_nodes(op="call_function", target=F.dropout)):
        arguments = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | node.kwargs
        if arguments.get("training", True) is not mode:
            continue
        name = f"functional_dropout{i}"
        model.add_module(name, nn.Dropout(arguments.get("p", 0.5)))
        node.op, node.target, node.args, node.kwargs = "call_module", name, (arguments["input"],), {}


@contextlib.contextmanager
def computing_modes(enabled: bool) -> Iterator[None]:
    """Turn gradients and autocast on or off; autocast for CUDA needs no GPU here, since nothing is computed."""
    before = {device: torch.is_autocast_enabled(device) for device in AUTOCAST}
    try:
        for device in AUTOCAST:
            torch.set_autocast_enabled(device, enabled)
        with torch.set_grad_enabled(enabled):
            yield
    finally:
        for device, value in before.items():
            torch.set_autocast_enabled(device, value)
