"""The routing of any network that contains routers."""

import contextlib
import inspect
import itertools
import threading
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from fastroute.nn.router import Router, Routing
from fastroute.nn.sparse import SparseRouter, SparseRouting


def takes_routing(network: nn.Module) -> bool:
    """Return whether the network's forward takes `return_routing`."""
    return "return_routing" in inspect.signature(network.forward).parameters


def forward_with_routing(network: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Routing | SparseRouting]]:
    """Return what a network computes, and the routing of each of its routers.

    Networks of this package return it with `return_routing=True`. In any other network, each `Router` and
    `SparseRouter` is asked for it. Gradients flow through both.

    Args:
        network: called as `network(x)`, or `network(x, return_routing=True)` if its forward takes that. Hooks are put
            on its routers meanwhile; they do not reach routers within a compiled or scripted network.
        x: the input.

    Returns:
        output: of the network.
        routing: router name → its routing, in the order of computation; routers within the layers of a
            `MultiPathNetwork` come last. A router that is called again has another name for each later call, with "_2",
            "_3" and so on. The name of a network that is a router itself is "".

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 16, 3), SparseRouter(16, [nn.Identity() for _ in range(4)]))
        >>> output, routing = forward_with_routing(network, torch.randn(8, 3, 32, 32))
        >>> routing["1"].gates.shape
        torch.Size([8, 4])
    """
    if takes_routing(network) and not isinstance(network, Router | SparseRouter):
        return network(x, return_routing=True)
    with routing_of(routers_in(network)) as found:
        return network(x), found


def routers_in(network: nn.Module) -> dict[str, Router | SparseRouter]:
    """Return the routers of a network by their names, its own name being ""."""
    return {name: module for name, module in network.named_modules() if isinstance(module, Router | SparseRouter)}


@contextlib.contextmanager
def routing_of(routers: Mapping[str, nn.Module]) -> Iterator[dict[str, Routing | SparseRouting]]:
    """Take the routing of each call of routers inside, by their names; see `forward_with_routing`."""
    found: dict[str, Routing | SparseRouting] = {}
    caller = threading.get_ident()  # whose calls alone count: the hooks see those of other threads too
    with contextlib.ExitStack() as hooks:
        for name, router in routers.items():
            asked = []  # whether the network itself asks, for each call that is running

            def ask(module, args, options, asked=asked):
                if threading.get_ident() != caller:
                    return None
                asked.append(options.get("return_routing", len(args) > 1 and args[1]))
                return args[:1], options | {"return_routing": True}

            def take(module, args, result, name=name, asked=asked):
                if threading.get_ident() != caller:
                    return None
                output, routing = result
                names = itertools.chain([name], (f"{name}_{call}" for call in itertools.count(2)))
                found[next(free for free in names if free not in found)] = routing
                return result if asked.pop() else output

            hooks.callback(router.register_forward_pre_hook(ask, with_kwargs=True).remove)
            hooks.callback(router.register_forward_hook(take).remove)
        yield found
