"""Gradient checkpointing: recompute activations in the backward pass, for less memory and more time."""

import contextlib
import functools
import types
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastroute.nn import SparseRouter
from fastroute.nn.gate_norm import GateNorm
from fastroute.training.optim import ROUTERS, layers


def checkpoint_gradients(network: nn.Module) -> None:
    """Make a network keep only the inputs of its blocks, and recompute the activations in them in the backward pass.

    timm's networks do it by their own `set_grad_checkpointing`. In others, a block is a layer that contains layers (see
    `layers`), such as a residual block, the parallel paths between two routers, or a path of a `SparseRouter`. Routers
    keep their activations, so gates and scores are returned as without checkpointing. Gradients are the same, and batch
    norm and `gate_norm` count a batch once; batch norm in timm's own checkpoints counts it twice.

    Args:
        network: changed in place.

    Raises:
        ValueError: the network has no such blocks.
    """
    own = getattr(network, "set_grad_checkpointing", None)
    if own is not None:
        with contextlib.suppress(AssertionError, NotImplementedError):  # timm's, if a network does not support it
            own(True)
            return
    blocks = [module for layer in layers(network) for module in layer]
    blocks += [path for router in blocks if isinstance(router, SparseRouter) for path in _paths(router)]
    blocks = [module for module in blocks if any(module.children()) and not isinstance(module, ROUTERS)]
    if not blocks:
        raise ValueError(f"grad_checkpointing is True, but {type(network).__name__} has no blocks of layers")
    for block in blocks:
        own = vars(block).get("forward")
        if getattr(own, "__func__", None) is not _forward:
            block._plain_forward = own
            block.forward = types.MethodType(_forward, block)  # a method, so that a copy gets its own


def _paths(router: SparseRouter) -> list[nn.Module]:
    return [] if router.paths is None else list(router.paths.children())


def _forward(block: nn.Module, *args, **options):
    forward = block._plain_forward or functools.partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **options)
    contexts = functools.partial(_contexts, block)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **options)


_forward.same_results = True  # `sources.layout` leaves it out: the results are those of the block's own forward


def _contexts(block: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    priors = {m: m.prior.clone() for m in block.modules() if isinstance(m, GateNorm) and m.prior is not None}
    return contextlib.nullcontext(), _statistics_kept(block, priors)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module, priors: dict[GateNorm, Tensor]) -> Iterator[None]:
    """Make batch norm normalise by the batch, as in the first pass, without updating its statistics again.

    Args:
        block: recomputed.
        priors: those of the first pass.
    """
    for norm, prior in priors.items():
        norm.earlier_prior = prior
    norms = [(m, m.momentum, m.num_batches_tracked) for m in block.modules() if isinstance(m, _BatchNorm)]
    for norm, _, _ in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum, norm.num_batches_tracked = momentum, count
