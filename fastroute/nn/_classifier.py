"""timm's interface of a classifier, for networks of one path or several."""

import contextlib
import copy
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fastroute.nn.blocks import SEQUENTIAL
from fastroute.nn.routed import routing_of
from fastroute.nn.router import Router, Routing, unwrapped
from fastroute.nn.sparse import SparseRouter

_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Flatten)
_TRANSPARENT_CALLS = (
    *("flatten", "squeeze", "float", "to", "contiguous"),
    *(torch.flatten, torch.squeeze, F.dropout),
)


class Classifies:
    """Mixin of networks of a body and a head that ends in a dense layer for each path; logits are averaged over paths.

    Subclasses implement `_body`, `_head` and `_heads`. The features of several paths are concatenated along the
    channels, so that `forward_head(forward_features(x))` is `forward(x)`.
    """

    _without: str | None = None
    """The part that was removed: the "classifier", or the whole "head"; None if the output is logits."""

    has_inner_routers = False
    """Whether there were routers within layers, which `_body` does not ask for their routing."""

    _channels: list[int] | None = None
    """The channels of each path's features, as `forward_features` last had them, if they differ."""

    def _body(self, x: Tensor, maps: list[list[Tensor]] | None = None) -> tuple[list[Tensor], dict[str, Routing]]:
        """Return the head's input, a tensor for each path, and the routing; append each layer's output to `maps`."""
        raise NotImplementedError

    def _heads(self) -> list[str]:
        """Return the names of the head's modules, one for each path."""
        raise NotImplementedError

    def _head(self, xs: list[Tensor]) -> list[Tensor]:
        """Return the logits of each path."""
        raise NotImplementedError

    def forward(self, x: Tensor, return_routing: bool = False) -> Tensor | tuple[Tensor, dict[str, Routing]]:
        return self._classify(x, return_routing)

    def _classify(self, x: Tensor, return_routing: bool, **options) -> Tensor | tuple[Tensor, dict[str, Routing]]:
        """Compute what `forward` returns, with options of the body."""
        if return_routing and self.has_inner_routers:
            with routing_of(self._inner_routers()) as inner:
                xs, routing = self._body(x, **options)
                return self._from_head(xs), routing | inner
        xs, routing = self._body(x, **options)
        y = self._from_head(xs)
        return (y, routing) if return_routing else y

    def _inner_routers(self) -> dict[str, nn.Module]:
        found = {name: module for name, module in self.named_modules() if isinstance(module, Router | SparseRouter)}
        inner = {name: router for name, router in found.items() if "." in name}
        for name in inner:
            layer = name.partition(".")[0]
            if getattr(self.get_submodule(layer), "execution", None) == "batched":
                raise ValueError(f"the routing of {name} is asked for, but the execution of {layer} is 'batched'")
        return inner

    def _from_head(self, xs: list[Tensor]) -> Tensor:
        if self._without == "head":
            return _joined(xs)
        ys = self._head(xs)
        if self._without == "classifier":
            return _joined(ys)
        return ys[0] if len(ys) == 1 else torch.stack(ys).mean(0)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the head's input: (N, C, H, W) if the head pools, concatenated over paths along the channels.

        Args:
            x: images (N, in_chans, H, W).
        """
        xs = self._body(x)[0]
        if len({x.shape[1] for x in xs}) > 1:
            self._channels = [x.shape[1] for x in xs]
        return _joined(xs)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits for `forward_features`.

        Args:
            x: from `forward_features`.
            pre_logits: return the classifier's input (N, num_features) instead.
        """
        xs = list(x.split(self._channels, 1) if self._channels else x.chunk(self._streams(), 1))
        if not pre_logits or self._without == "head":
            return self._from_head(xs)
        kept, names, caller = {}, self._classifiers(), threading.get_ident()

        def keep(i: int, x: Tensor) -> None:
            if threading.get_ident() == caller:  # hooks see the calls of other threads too
                kept[i] = x

        hooks = [
            self.get_submodule(name).register_forward_pre_hook(lambda _, args, i=i: keep(i, args[0]))
            for i, name in enumerate(names)
        ]
        try:
            ys = self._head(xs)
        finally:
            for hook in hooks:
                hook.remove()
        return _joined([kept[i] for i in range(len(names))] if names else ys)

    def get_classifier(self) -> nn.Module:
        """Return the dense layer that computes the logits; those of several paths in an `nn.ModuleList`."""
        modules = [self.get_submodule(name) for name in self._checked_classifiers()]
        return modules[0] if len(modules) == 1 else nn.ModuleList(modules)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one, or remove it.

        Args:
            num_classes: the number of logits. 0 removes the classifier: the output is its input, (N, num_features).
            global_pool: "" with num_classes=0 makes the output that of `forward_features`; None and "avg" keep the
                pooling.

        Raises:
            ValueError: an argument is out of range, or the network does not end in a dense layer.
        """
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 0")
        if global_pool not in (None, "", "avg") or (global_pool == "" and num_classes):
            raise ValueError(f"global_pool is {global_pool!r}; it must be None, 'avg', or with num_classes=0 ''")
        names, width = self._checked_classifiers(), self._width
        like = next(self.parameters(), torch.empty(0))
        with specification_kept(self, num_classes):
            for name in names:
                layer = nn.Identity()
                if num_classes:
                    layer = self._new_classifier(width[name], num_classes, device=like.device, dtype=like.dtype)
                parent, _, last = name.rpartition(".")
                setattr(self.get_submodule(parent), last, layer)
            self._without = None if num_classes else ("head" if global_pool == "" else "classifier")

    def _new_classifier(self, in_features: int, out_features: int, **like) -> nn.Module:
        """Return a fresh classifier of a path."""
        return nn.Linear(in_features, out_features, **like)

    @property
    def num_classes(self) -> int | None:
        """The number of logits, 0 without a classifier; None for a network that does not end in a dense layer."""
        names = self._classifiers()
        return getattr(self.get_submodule(names[0]), "out_features", 0) if names else None

    @property
    def num_features(self) -> int:
        """The size of the classifier's input, of all paths together."""
        self._checked_classifiers()
        return sum(self._width.values())

    def _streams(self) -> int:
        """Return the number of tensors that `_body` returns."""
        return len(self._heads())

    def _classifiers(self) -> list[str]:
        if self._without is None or "_names" not in self.__dict__:  # a classifier may have been replaced by hand
            names = [final_linear(self.get_submodule(name), name) for name in self._heads()]
            self._names = names if all(names) else []
            self._width = {name: self.get_submodule(name).in_features for name in self._names}
        return self._names

    def _checked_classifiers(self) -> list[str]:
        if names := self._classifiers():
            return names
        raise ValueError(f"a {type(self).__name__} whose paths do not end in a dense layer has no classifier to reset")


@contextlib.contextmanager
def specification_kept(network: nn.Module, num_classes: int) -> Iterator[None]:
    """Replace the classifier inside; a specification that described the network before describes it after, too."""
    specification = getattr(network, "specification", None)
    described = specification is not None and specification.describes(network)
    yield
    if described:
        specification.follow(network, num_classes)


def final_linear(module: nn.Module, name: str) -> str | None:
    """Return the name of the dense layer in which the module `name` ends, or None if it ends in another layer."""
    if isinstance(module, nn.Linear):
        return name
    last = _last(module)
    return None if last is None else final_linear(module.get_submodule(last), f"{name}.{last}")


def _last(module: nn.Module) -> str | None:
    """Return the name of the submodule whose output a module returns; None if it computes its output otherwise."""
    children = [child for child, inner in module._modules.items() if not isinstance(inner, _TRANSPARENT)]
    if (inner := unwrapped(module)) is not module:
        return next(name for name, child in module.named_modules() if child is inner)
    if isinstance(module, fx.GraphModule):
        return _last_call(module)
    if children and type(module).forward not in SEQUENTIAL:
        try:
            return _returned(module)
        except Exception:  # of any type, out of a forward that depends on values: taken for a sequence
            pass
    return children[-1] if children else None


def _last_call(module: fx.GraphModule) -> str | None:
    node = module.graph.output_node().args[0]
    while isinstance(node, fx.Node) and node.args:
        if node.op == "call_module" and not isinstance(module.get_submodule(node.target), _TRANSPARENT):
            return node.target
        if node.op != "call_module" and node.target not in _TRANSPARENT_CALLS:
            return None
        node = node.args[0]
    return None


def _returned(module: nn.Module) -> str | None:
    """Return the submodule whose output a module's own forward returns, found by a call of it without values.

    The call gets a copy of the module, in which submodules only tell their names. torch.fx would not do: while it
    traces, no other thread can call a module.
    """
    stand_in = object.__new__(type(module))
    kept = ("_parameters", "_modules")
    stand_in.__dict__ = copy.deepcopy({key: value for key, value in vars(module).items() if key not in kept})
    stand_in._parameters = dict(module._parameters)
    stand_in._modules = {name: _Named(name, inner) for name, inner in module._modules.items()}
    result = type(module).forward(stand_in, _Value())
    return result.child if isinstance(result, _Value) else None


class _Value:
    """A tensor without values: it knows the submodule that computed it, if one did."""

    def __init__(self, child: str | None = None):
        self.child = child

    def __getattr__(self, name: str):
        return _Method(self, name)

    def __bool__(self):
        raise TypeError("a forward that depends on values")

    __iter__ = __bool__

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        return cls(arguments[0].child) if function in _TRANSPARENT_CALLS else cls()


class _Method(_Value):
    """An attribute of a value, which may be called as a method."""

    def __init__(self, value: _Value, name: str):
        super().__init__()
        self.value, self.name = value, name

    def __call__(self, *_, **__) -> _Value:
        return _Value(self.value.child if self.name in _TRANSPARENT_CALLS else None)


def _computed(*_) -> _Value:
    return _Value()


_OPERATORS = "add radd sub rsub mul rmul truediv rtruediv matmul rmatmul pow neg getitem eq ne lt le gt ge"
for _name in _OPERATORS.split():
    setattr(_Value, f"__{_name}__", _computed)


class _Named(nn.Module):
    """A submodule that tells its name and computes nothing."""

    def __init__(self, name: str, inner: nn.Module | None):
        super().__init__()
        self.name, self.transparent = name, isinstance(inner, _TRANSPARENT)

    def forward(self, *arguments, **_) -> _Value:
        return arguments[0] if self.transparent else _Value(self.name)


def _joined(xs: Sequence[Tensor]) -> Tensor:
    return xs[0] if len(xs) == 1 else torch.cat(list(xs), 1)
