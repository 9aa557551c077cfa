"""Trace networks by torch.fx."""

import contextlib
import os
import random
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

import torch
from torch import fx, nn
from torch.nn import functional as F

from fastroute.models._modes import modes_kept

AUTOCAST = ("cpu", "cuda")
IN_MODULES = ("_parameters", "_buffers", "_modules", "training")
RANDOM = "random numbers outside of tensors"

CONSTANT = "_tensor_constant"
"""The beginning of the names by which torch.fx keeps tensors that a forward makes."""


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

    Raises:
        ValueError: torch.fx cannot trace the forward, or the graph would compute something else: the forward depends on
            the mode, sets gradients or autocast, changes the modules of `expand`, or draws random numbers outside of
            tensors; or a module of `expand` has a method `train` of its own.
    """
    for name in sorted(expand):
        if type(model.get_submodule(name)).train is not nn.Module.train:
            raise ValueError(
                f"model is a {type(model).__name__}, in which {name or 'the network itself'} has a method train() of "
                "its own, which its parts would not have; convert it without this method, and set the modes of the "
                "result (to freeze batch norm, call eval() of these layers after each train())"
            )
    traces = []
    _take_constants(model)  # those of an earlier trace
    with modes_kept(model):
        # A forward may set gradients and autocast to what they are outside, so they are on once, and off once.
        for training, computing in ((True, True), (False, False)):
            before = _state(model, expand)
            with computing_modes(computing):
                graph, _ = _traced(model, expand, training)
            if any(node.meta["modes"] != (computing,) * 3 for node in graph.nodes):
                _refuse(model, "whose forward sets gradients or autocast")
            for name, value in _state(model, expand).items():
                if value != before.get(name):
                    _refuse(model, f"whose forward {'draws' if name == RANDOM else 'changes'} {name}")
            traces.append((str(graph), _take_constants(model)))
        if traces[0] != traces[1]:
            _refuse(model, "whose forward differs between training and evaluation")
        graph, tracer = _traced(model, expand, training=False)
    results = {
        name: [result.node if isinstance(result, fx.Proxy) else None for result in results]
        for name, results in tracer.results.items()
    }
    return graph, results


def _refuse(model: nn.Module, reason: str) -> NoReturn:
    raise ValueError(
        f"model is a {type(model).__name__}, {reason}, which a graph cannot keep; "
        "move that part of the forward into a module of its own, behind or between the modules to cut at"
    )


def _traced(model: nn.Module, expand: set[str], training: bool) -> tuple[fx.Graph, _Tracer]:
    tracer = _Tracer(expand)
    try:
        graph = tracer.trace(model.train(training))
    except Exception as error:  # a forward may do anything with a proxy
        raise ValueError(
            f"model is a {type(model).__name__}, which torch.fx cannot trace: {type(error).__name__}: {error}"
            f"{where(error)}; move what cannot be traced into a module of its own, which is kept whole, or choose "
            "other modules by route_after"
        ) from error
    _use_dropout_modules(model, graph, training)
    return graph, tracer


def where(error: Exception) -> str:
    """Return " (FILE:LINE)" of the last line outside of PyTorch and this package in which an error arose."""
    own = tuple(os.path.dirname(module.__file__) + os.sep for module in (torch, sys.modules["fastroute"]))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*own, "<"))]
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _state(model: nn.Module, names: set[str]) -> dict[str, str | list]:
    """Return what a forward of the named modules may change: their attributes, their buffers, random generators."""
    state = {}
    for name in names:
        module = model.get_submodule(name)
        prefix = f"{name}." if name else ""
        attributes = {key: repr(value) for key, value in vars(module).items() if key not in IN_MODULES}
        state |= {f"{prefix}{key}": text for key, text in attributes.items() if not key.startswith(CONSTANT)}
        state |= {f"{prefix}{key}": _values(value) for key, value in module._buffers.items() if value is not None}
    return state | {RANDOM: _random_states()}


def _values(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tensor.shape, tensor.tolist() if not tensor.is_meta else None


def _take_constants(model: nn.Module) -> dict[str, tuple]:
    """Remove the constants that tracing has put into the network, and return their values."""
    names = [name for name in vars(model) if name.startswith(CONSTANT)]
    return {name: _values(vars(model).pop(name)) for name in names}


def _random_states() -> list:
    """Return the states of the random generators: a graph would fix what a forward draws outside of tensors."""
    numpy = sys.modules.get("numpy")
    return [random.getstate(), torch.get_rng_state().tolist(), numpy and repr(numpy.random.get_state(legacy=False))]


def _use_dropout_modules(model: nn.Module, graph: fx.Graph, mode: bool) -> None:
    for i, node in enumerate(graph.find_nodes(op="call_function", target=F.dropout)):
        arguments = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | node.kwargs
        if arguments.get("training", True) is not mode:
            continue
        name = f"functional_dropout{i}"
        model.add_module(name, nn.Dropout(arguments.get("p", 0.5), arguments.get("inplace", False)))
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
