"""timm's interface of a classifier, for networks of one path or several."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastroute.nn._last_layer import final_linear
from fastroute.nn._specification import specification_kept
from fastroute.nn.routed import routers_in, routing_of
from fastroute.nn.router import Routing


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
        inner = {name: router for name, router in routers_in(self).items() if "." in name}
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
        with specification_kept(self, num_classes=num_classes):
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


def _joined(xs: Sequence[Tensor]) -> Tensor:
    return xs[0] if len(xs) == 1 else torch.cat(list(xs), 1)
