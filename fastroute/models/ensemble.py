"""Ensembles of separately trained networks (Table 3.1)."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastroute._files import DamagedFile, read_tensors
from fastroute.models.registry import create_model, register_model
from fastroute.models.specification import specification_in
from fastroute.models.weights import network_weights
from fastroute.nn import Routing, forward_with_routing
from fastroute.nn._classifier import Classifies
from fastroute.nn._specification import specification_kept


class Ensemble(nn.Module):
    """Average the predicted probabilities of several networks.

    The softmax of the output is the mean of the softmaxes of the members' logits.

    Args:
        members: networks from images to logits of the same classes.

    Shape:
        x: (N, in_chans, H, W).
        output: logits (N, num_classes): the logarithm of the mean probabilities. With `return_routing=True` also the
            `Routing` of every member's routers, by "members.<i>.<router's name>".

    Raises:
        ValueError: there are no members.
    """

    def __init__(self, members: Iterable[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)
        self._widths: list[int] | None = None  # of the members' features
        if not self.members:
            raise ValueError("members is empty; an ensemble must have at least one")

    @classmethod
    def from_checkpoints(cls, paths: Iterable[str | Path]) -> "Ensemble":
        """Build an ensemble from checkpoints of `fastroute train`.

        Args:
            paths: the files.

        Raises:
            ValueError: a file is not a checkpoint of a named network.
        """
        return cls(_load(path) for path in paths)

    def forward(self, x: Tensor, return_routing: bool = False) -> Tensor | tuple[Tensor, dict[str, Routing]]:
        logits, routing = [], {}
        for i, member in enumerate(self.members):
            if return_routing:
                y, of_member = forward_with_routing(member, x)
                routing |= {f"members.{i}.{name}": value for name, value in of_member.items()}
            else:
                y = member(x)
            logits.append(y)
        mean = self._combined(logits)
        return (mean, routing) if return_routing else mean

    @property
    def num_classes(self) -> int | None:
        """The number of logits, that of the members."""
        return getattr(self.members[0], "num_classes", None)

    @property
    def num_features(self) -> int:
        """The number of features of all members together."""
        return sum(member.num_features for member in self.members)

    def get_classifier(self) -> nn.ModuleList:
        """Return the members' classifiers."""
        return nn.ModuleList(member.get_classifier() for member in self.members)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier of each member; see `MultiPathNetwork.reset_classifier`.

        Args:
            num_classes, global_pool: as there.
        """
        with specification_kept(self, num_classes=num_classes):
            for member in self.members:
                member.reset_classifier(num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the members' features for images x (N, in_chans, H, W), concatenated along the channels."""
        parts = [member.forward_features(x) for member in self.members]
        self._widths = [part.shape[1] for part in parts]
        return torch.cat(parts, 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits for the features x of `forward_features`, or with `pre_logits` the classifiers' input."""
        # Before any call of forward_features: the classifiers' widths, which most networks' features have.
        parts = x.split(self._widths or [member.num_features for member in self.members], 1)
        ys = [member.forward_head(part, pre_logits) for member, part in zip(self.members, parts, strict=True)]
        return torch.cat(ys, 1) if pre_logits else self._combined(ys)

    def _combined(self, ys: Sequence[Tensor]) -> Tensor:
        first = self.members[0]
        if isinstance(first, Classifies):  # to find its number of classes takes time
            without_classifier = first._without is not None
        else:
            without_classifier = getattr(first, "num_classes", None) == 0
        if without_classifier:
            return torch.cat(list(ys), 1)
        return torch.stack([y.log_softmax(1) for y in ys]).logsumexp(0) - math.log(len(ys))


def _load(path: str | Path, name: str | None = None) -> nn.Module:
    try:
        checkpoint = read_tensors(path)
    except DamagedFile as error:
        raise DamagedFile(f"checkpoint is {path}; {error}; copy it again from where it came, or use another") from error
    options = checkpoint.get("hyper_parameters", {})
    if "model" not in options or "state_dict" not in checkpoint:
        raise ValueError(f"checkpoint is {path}; it must be one of a named network, written by `fastroute train`")
    if name not in (None, options["model"]):
        raise ValueError(f"checkpoint {path} is of {options['model']!r}; this member must be {name!r}")
    model = specification_in(options, f"checkpoint is {path}").build()
    model.load_state_dict(network_weights(checkpoint))
    return model


def ensemble(members: Sequence[str], checkpoints: Sequence[str | Path] | None = None, **sizes) -> Ensemble:
    """Build an ensemble of named networks with fresh weights, or from checkpoints.

    Args:
        members: the names of the networks.
        checkpoints: files of `fastroute train`, one for each member, in their order; None takes fresh weights.
        sizes: num_classes, in_chans and img_size of fresh networks.

    Raises:
        ValueError: there is another number of checkpoints, or one is of another network or of other sizes.
    """
    if checkpoints is None:
        return Ensemble(create_model(name, **sizes) for name in members)
    if len(checkpoints) != len(members):
        raise ValueError(f"checkpoints has {len(checkpoints)} files; it must have one for each of {', '.join(members)}")
    network = Ensemble(_load(path, name) for path, name in zip(checkpoints, members, strict=True))
    for size in ("num_classes", "in_chans"):
        first, *others = (getattr(member.specification, size) for member in network.members)
        for path, other in zip(checkpoints[1:], others, strict=True):
            if other != first:
                raise ValueError(f"checkpoint {path} has {size}={other}; {checkpoints[0]} has {first}: they must agree")
    return network


@register_model(table="3.2", params="1.66")
def base_cnn_ensemble(**options) -> nn.Module:
    """Build an ensemble of three BaseCNNs; `checkpoints` names three files to start from."""
    return ensemble(["base_cnn"] * 3, **options)


@register_model(table="3.2", params="4.27")
def all_ensemble(**options) -> nn.Module:
    """Build an ensemble of BaseCNN, WideCNN and DeepCNN; `checkpoints` names three files to start from."""
    return ensemble(["base_cnn", "wide_cnn", "deep_cnn"], **options)
