"""Keep what a network remembers of its construction true while the network is changed."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def specification_kept(network: nn.Module, **changes: Any) -> Iterator[None]:
    """Keep the network's specification valid while the block changes the network.

    Args:
        network: the network, which may have no specification.
        changes: the fields of its specification that differ afterwards.
    """
    specification = getattr(network, "specification", None)
    described = specification is not None and specification.describes(network)
    yield
    if described:
        specification.follow(network, **changes)
