"""Containers for networks whose layers pass lists of parallel tensors."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from fastroute.nn._classifier import Classifies
from fastroute.nn._lists import TakesLists
from fastroute.nn.router import Router, Routing, unwrapped
from fastroute.ops._compile_form import is_exporting
from fastroute.ops._paths import path_list

# Device type → execution chosen by "auto"; "separate" on other devices. On two cores of an EPYC, 72 cases of
# convolution, normalisation and ReLU at the thesis's shapes ran 1.05 to 3.13 times as fast "separate" as "batched", and
# 0.85 to 2.02 times (geometric mean 1.11) as fast as one grouped convolution over maps that are already joined
# (`fastroute bench -k "parallel-*"`).
EXECUTION = {"cpu": "separate"}

TAKE_A_TENSOR = _ConvNd, _NormBase, nn.Linear
"""Layers of PyTorch that are likely to be given to a network of lists without `ParallelPaths`."""


class ParallelPaths(TakesLists, nn.ModuleList):
    """Parallel paths: one module per path, each applied to its own tensor.

    Args:
        paths: the modules.
        execution: "separate" runs one path after the other. "batched" runs all at once over their stacked weights and
            tensors (`torch.vmap`), so that convolutions become one grouped convolution and dense layers one batched
            product; the paths may differ only in their weights. "auto" takes the faster one, as measured on the
            tensors' device (`EXECUTION`). The parameters are the same in all modes. Exports are always "separate", and
            so is autocast on a CPU.

    Shape:
        xs: list of n tensors for n modules, or a list of one tensor, which all of them share: then none may overwrite
            its input in-place.
        output: list of n tensors.

    Raises:
        TypeError: paths is no list of modules, or xs no list of tensors.
        ValueError: there are no modules; xs has another number of tensors; or execution is unknown, or is "batched" and
            the paths differ.

    Example:
        >>> paths = ParallelPaths(nn.Conv2d(16, 32, 3, padding=1) for _ in range(2))
        >>> ys = paths([torch.randn(8, 16, 32, 32) for _ in range(2)])
        >>> len(ys), ys[0].shape
        (2, torch.Size([8, 32, 32, 32]))
    """

    _execution = "auto"

    def __init__(self, paths: Iterable[nn.Module], execution: str = "auto"):
        if not isinstance(paths, Iterable):
            raise TypeError(f"paths is a {type(paths).__name__}; it must be a list of modules")
        super().__init__(paths)
        self.execution = execution

    @property
    def execution(self) -> str:
        return self._execution

    @execution.setter
    def execution(self, execution: str) -> None:
        if execution not in ("auto", "separate", "batched"):
            raise ValueError(f"execution is {execution!r}; it must be 'auto', 'separate' or 'batched'")
        if execution == "batched" and len({repr(path) for path in self}) > 1:
            raise ValueError("execution is 'batched'; the paths must differ only in their weights")
        self._execution = execution

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        xs = path_list("xs", xs)
        if not self:
            raise ValueError("there are no paths; give at least one module")
        if len(xs) not in (1, len(self)):
            raise ValueError(f"xs has {len(xs)} tensors; it must have one for each of the {len(self)} paths, or one")
        execution, device = self._execution, xs[0].device.type
        if execution == "auto":
            execution = EXECUTION.get(device, "separate")
        if device == "cpu" and torch.is_autocast_enabled("cpu"):  # which convolutions under vmap do not follow
            execution = "separate"
        traced = is_exporting() or torch.jit.is_tracing()  # neither takes stacked parameters
        if execution == "batched" and not traced and next(self.parameters(), None) is not None:
            return self._batched(xs)
        return [path(xs[i if len(xs) > 1 else 0]) for i, path in enumerate(self)]

    def _batched(self, xs: Sequence[Tensor]) -> list[Tensor]:
        if len({tuple(module.training for module in path.modules()) for path in self}) > 1:
            raise ValueError("execution is 'batched'; the paths must be all in training mode or all in evaluation mode")
        first, *_ = self
        parameters = {name: torch.stack([p.get_parameter(name) for p in self]) for name, _ in first.named_parameters()}
        buffers = {name: torch.stack([p.get_buffer(name) for p in self]) for name, _ in first.named_buffers()}

        def run(parameters, buffers, x):
            return torch.func.functional_call(first, (parameters, buffers), x)

        # Stack the paths next to the channels, as a grouped convolution needs them.
        x, in_dim = (xs[0], None) if len(xs) == 1 else (torch.stack(list(xs), 1), 1)
        ys = torch.vmap(run, (0, 0, in_dim), out_dims=1, randomness="different")(parameters, buffers, x)
        if not any(module.training for module in first.modules()):
            return list(ys.unbind(1))
        with torch.no_grad():
            for name, stacked in buffers.items():  # vmap updated the stacked running statistics
                for path, value in zip(self, stacked, strict=True):
                    path.get_buffer(name).copy_(value)
        return list(ys.unbind(1))


class MultiPathNetwork(Classifies, nn.Module):
    """A network of layers that take and return lists of parallel tensors; the logits of its paths are averaged.

    The first layer gets the images as a list of one tensor. A plain network is the special case of one path.

    Args:
        layers: name → module, in the order in which they run. Each takes a list of tensors and returns a list; the
            last returns logits (N, num_classes) for each path.

    Raises:
        TypeError: layers is no dict.
        ValueError: a layer takes no list of tensors.

    Shape:
        x: (N, in_chans, H, W).
        output: logits (N, num_classes). With `return_routing=True` also a dict from the layer name of each router to
            its `Routing`; it is empty for a network without routers.

    Example:
        >>> from fastroute.nn import CrossConnection
        >>> def head():
        ...     return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
        >>> network = MultiPathNetwork({
        ...     "stem": ParallelPaths(nn.Conv2d(3, 16, 3, padding=1) for _ in range(2)),
        ...     "router": CrossConnection(16, in_paths=2, out_paths=2),
        ...     "head": ParallelPaths(head() for _ in range(2)),
        ... })
        >>> logits, routing = network(torch.randn(8, 3, 32, 32), return_routing=True)
        >>> logits.shape, routing["router"].gates.shape
        (torch.Size([8, 10]), torch.Size([8, 2, 2]))
    """

    undecayed: frozenset[str] = frozenset()

    _conversion: Mapping[str, Any] | None = None
    """The arguments of `multipath`, if it made this network of one whose construction is not known."""

    def __init__(self, layers: Mapping[str, nn.Module]):
        super().__init__()
        if not isinstance(layers, Mapping | nn.ModuleDict):
            raise TypeError(f"layers is a {type(layers).__name__}; it must be a dict from names to modules")
        for name, layer in layers.items():
            if isinstance(layer, TAKE_A_TENSOR) and type(layer).__module__.startswith("torch.nn."):
                raise ValueError(
                    f"layers[{name!r}] is a {type(layer).__name__}, which takes no list of tensors; give it for each "
                    "path: ParallelPaths([…])"
                )
            self.add_module(name, layer)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, which the converted network listed as timm asks."""
        return set(self.undecayed)

    def _body(self, x: Tensor, maps: list[list[Tensor]] | None = None) -> tuple[list[Tensor], dict[str, Routing]]:
        xs, routing = [x], {}
        for name, layer in self._layers():
            if isinstance(unwrapped(layer), Router):
                xs, routing[name] = layer(xs, return_routing=True)
            else:
                xs = layer(xs)
            if maps is not None:
                maps.append(xs)
        return xs, routing

    def _layers(self) -> list[tuple[str, nn.Module]]:
        """Return all layers but the head."""
        layers = list(self._modules.items())  # `named_children` leaves out a layer that comes again
        return layers if isinstance(unwrapped(layers[-1][1]), Router) else layers[:-1]

    def _head(self, xs: list[Tensor]) -> list[Tensor]:
        head = list(self._modules.values())[-1]
        return xs if isinstance(unwrapped(head), Router) else head(xs)

    def _heads(self) -> list[str]:
        name, head = list(self._modules.items())[-1]
        return [f"{name}.{i}" for i in range(len(head))] if isinstance(head, ParallelPaths) else []

    def _streams(self) -> int:
        count = 1
        for _, layer in self._layers():
            layer = unwrapped(layer)
            count = len(layer) if isinstance(layer, ParallelPaths) else getattr(layer, "out_paths", count)
        return count
