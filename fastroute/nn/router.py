"""The base of all routers: gates computed from the incoming paths."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastroute.nn._lists import TakesLists
from fastroute.nn._specification import specification_kept
from fastroute.nn.gate_norm import GateNorm, check_gate_norm, make_gate_norm
from fastroute.ops import gate
from fastroute.ops._library import without_autocast
from fastroute.ops._paths import MAX_PATHS, check_integers, path_list
from fastroute.ops._results import exportable

TEMPERATURE = "temperature"
"""The name of a router's temperature in its state dict; see `Tempered`."""


# Names under which PyTorch's wrappers keep a module: `torch.compile`, activation checkpointing, and FSDP. The last two
# are not in state dicts.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def temperatures(network: nn.Module) -> set[str]:
    """Return the names that the temperatures of a network's routers have in its state dict."""
    modules = network.named_modules(remove_duplicate=False)
    names = (f"{name}.{TEMPERATURE}".lstrip(".") for name, module in modules if isinstance(module, Tempered))
    return {".".join(part for part in name.split(".") if part not in _WRAPPED[1:]) for name in names}


def without_temperatures(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return a state dict of a network without its routers' temperatures, which another of its state dicts may lack."""
    left_out = temperatures(network)
    return {name: value for name, value in state.items() if name not in left_out}


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside of PyTorch's wrappers, which are called in its place."""
    for name in _WRAPPED * 2:  # in any order of two wrappers
        module = module._modules.get(name, module)
    return module


@exportable
class Routing(NamedTuple):
    """Decisions of a router for each sample.

    gates: (N, m, n); `gates[s, i, j]` is the weight of input i in output j, and each row i sums to 1.
    scores: (N, m, n), the relevance scores A, before the temperature and softmax; normalised if the router has a
        `gate_norm`.
    """

    gates: Tensor
    scores: Tensor


class Tempered:
    """Mixin of modules with gates softmax(A / T): even gates as T grows, a choice of one path as T falls to 0.

    `temperature` is a plain number, neither parameter nor buffer: assign to it between steps to anneal. The first
    change recompiles a compiled module; later changes do not. The state dict has the temperature, as a tensor of one
    number, once it has differed from 1; loading a state dict without it, as in older files, does not change it.

    A copy of the network that averages its weights, such as `torch.optim.swa_utils.AveragedModel`, has temperatures of
    its own: change them with the network's. timm's `ModelEma` needs state dicts of equal length: set another
    temperature than 1 before it copies the network. The trainer's `MovingAverage` follows the network by itself.
    `torch.distributed.checkpoint.load` reads only what the network's state dict has: set another temperature than 1
    before it.
    """

    _temperature, _tempered = 1.0, False

    @property
    def temperature(self) -> float:
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        try:
            fits = 0 < value < math.inf
        except TypeError:
            raise TypeError(f"temperature is {value!r}; it must be a number") from None
        if not fits:
            raise ValueError(f"temperature is {value}; it must be positive and finite")
        self._temperature = float(value)
        self._tempered = self._tempered or self._temperature != 1

    def _make_gate_norm(self, gate_norm: str | None, prior: str | None) -> GateNorm | None:
        """Return the normalisation for this module's gates, or None."""
        *in_paths, out_paths, _ = self.w2.shape
        return make_gate_norm(gate_norm, prior, *(in_paths or [None]), out_paths, self.w2.device)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._tempered:
            destination[prefix + TEMPERATURE] = torch.tensor(self._temperature, dtype=torch.float64, device="cpu")

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        value = state_dict.pop(prefix + TEMPERATURE, None)
        if value is not None and not value.is_meta:  # tensors of the meta device have no values
            self.temperature = value.item()
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class Router(TakesLists, Tempered, nn.Module):
    """Base of layers from m parallel tensors to n, with a gate for each incoming path (Eq. 3.3 to 3.5).

    Parameters: w1 (m, G, C), b1 (m, G), w2 (m, n, G), b2 (m, n); w2 is (m, n, C), and w1 and b1 are None, without a
    hidden layer. Subclasses return `(outputs, Routing)` from `forward(xs, return_routing=True)`.

    Full backward hooks do not run on layers that take and return lists: use `Tensor.register_hook` on the outputs.
    """

    def __init__(
        self,
        channels: int,
        in_paths: int,
        out_paths: int,
        gate_channels: int | None,
        gate_bias: bool,
        temperature: float,
        gate_norm: str | None,
        prior: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ):
        super().__init__()
        check_integers(in_paths=in_paths, out_paths=out_paths, gate_channels=gate_channels or 0)
        for name, paths in (("in_paths", in_paths), ("out_paths", out_paths)):
            if not 1 <= paths <= MAX_PATHS:
                raise ValueError(f"{name} is {paths}; it must be 1 to {MAX_PATHS}")
        if gate_channels is not None and gate_channels < 0:
            raise ValueError(f"gate_channels is {gate_channels}; it must be at least 0; 0 or None makes a linear gate")
        self.in_paths, self.out_paths = in_paths, out_paths
        self.gate_channels = gate_channels or None
        self.temperature = temperature

        def parameter(*shape):
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        hidden = self.gate_channels is not None
        self.w1 = parameter(in_paths, gate_channels, channels) if hidden else None
        self.b1 = parameter(in_paths, gate_channels) if hidden and gate_bias else None
        self.w2 = parameter(in_paths, out_paths, gate_channels if hidden else channels)
        self.b2 = parameter(in_paths, out_paths) if gate_bias else None
        self.gate_norm = self._make_gate_norm(gate_norm, prior)

    def reset_parameters(self) -> None:
        """Initialise the first layer as `nn.Linear` does, and the second near zero: gates within about 0.001 of 1/n."""
        if self.w1 is not None:
            bound = 1 / math.sqrt(self.w1.shape[-1])  # equals nn.Linear's Kaiming-uniform bound
            for parameter in (self.w1, self.b1):
                if parameter is not None:
                    nn.init.uniform_(parameter, -bound, bound)
        nn.init.normal_(self.w2, std=0.001)
        if self.gate_norm is not None:
            self.gate_norm.reset_running_stats()
        if self.b2 is not None:
            nn.init.zeros_(self.b2)

    def _gate(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
        """Return w1, b1, w2 and b2 for scores A / T; A is linear in w2 and b2, so these include 1 / T."""
        if self.gate_norm is not None and not self.training:
            return self.w1, self.b1, *self.gate_norm.fold(self.w2, self.b2, self.temperature)
        if self.temperature == 1 or self.gate_norm is not None:
            return self.w1, self.b1, self.w2, self.b2
        dtype = torch.promote_types(self.w2.dtype, torch.float32)  # in float16 a small temperature gives infinities
        w2, b2 = (None if p is None else p.to(dtype) / self.temperature for p in (self.w2, self.b2))
        return self.w1, self.b1, w2, b2

    def _routing(self, gates: Tensor, scores: Tensor) -> Routing:
        """Return the routing for scores A / T, or those of a folded normalisation."""
        if self.gate_norm is not None:
            return Routing(gates, self.gate_norm.unfold(scores, self.temperature))
        return Routing(gates, scores if self.temperature == 1 else scores * self.temperature)

    def _normalized(self, xs: Sequence[Tensor]) -> Routing:
        """Return the routing by scores normalised over the batch, in training mode."""
        _, scores = gate(xs, *self._gate())
        with without_autocast(scores.device.type):
            logits, scores = self.gate_norm.logits(scores, self.temperature)
            return Routing(logits.softmax(-1), scores)

    def _checked(self, xs: Sequence[Tensor], channels: int, name: str) -> list[Tensor]:
        """Return xs after checking the numbers of paths and channels; `name` is the argument that gave the latter."""
        xs = path_list("xs", xs)
        if len(xs) != self.in_paths:
            raise ValueError(f"xs has {len(xs)} paths; this router takes in_paths={self.in_paths}")
        if xs[0].dim() < 2 or xs[0].shape[1] != channels:
            raise ValueError(f"xs[0] has shape {tuple(xs[0].shape)}; it must be (N, C, *S) with {name}={channels}")
        return xs


def set_gate_norm(network: nn.Module, gate_norm: str | None, prior: str | None = None) -> None:
    """Set the normalisation of every router of a network, with fresh statistics.

    Args:
        network: changed in-place.
        gate_norm, prior: see `CrossConnection`; None removes the normalisation, or for a clustered `SparseRouter`
            sets its own.

    Raises:
        ValueError: gate_norm or prior is unknown, or the network has no router.

    Example:
        >>> from fastroute.nn import CrossConnection
        >>> router = CrossConnection(16, in_paths=2, out_paths=2)
        >>> set_gate_norm(router, "standardize")
        >>> router.gate_norm
        GateNorm('standardize', (2, 2), momentum=0.1)
    """
    check_gate_norm(gate_norm, prior)
    routers = [module for module in network.modules() if isinstance(module, Tempered)]
    for name, value in (("gate_norm", gate_norm), ("prior", prior)):
        if not routers and value is not None:
            raise ValueError(f"{name} is {value!r}; the network has no router to normalise the gates of")
    with specification_kept(network, gate_norm=gate_norm, prior=prior):
        for router in routers:
            norm = router._make_gate_norm(gate_norm, prior)
            router.gate_norm = None if norm is None else norm.train(router.training)
    if getattr(network, "_conversion", None) is not None:
        network._conversion = {**network._conversion, "gate_norm": gate_norm, "prior": prior}
