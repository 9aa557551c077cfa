"""Less memory for more time: activations that are computed again in the backward pass."""

import contextlib
import functools
import types
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from fastroute.training.optim import ROUTERS, layers


def checkpoint_gradients(network: nn.Module) -> None:
    """Have a network keep the inputs of its blocks alone, and compute what is within them again in the backward pass.

    timm's networks do it their own way, `set_grad_checkpointing`. In others, a block is a layer with layers in it (see
    `layers`), such as a residual block, or the parallel paths between two routers. Routers keep what they need, so that
    gates and scores are returned as always. Gradients are the same, and batch norm counts a batch once.

    Raises:
        ValueError: the network has no such blocks.
    """
    own = getattr(network, "set_grad_checkpointing", None)
    if own is not None:
        with contextlib.suppress(AssertionError, NotImplementedError):  # timm's, where a network has not got it
            own(True)
            return
    blocks = [module for layer in layers(network) for module in layer]
    blocks = [module for module in blocks if any(module.children()) and not isinstance(module, ROUTERS)]
    if not blocks:
        raise ValueError(f"grad_checkpointing is True, but {type(network).__name__} has no blocks of layers")
    for block in blocks:
        block.forward = types.MethodType(_forward, block)  # a method, so that a copy's is the copy's own


def _forward(block: nn.Module, *args, **options):
    forward = functools.partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **options)
    contexts = functools.partial(_contexts, block)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **options)


def _contexts(block: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    return contextlib.nullcontext(), _statistics_kept(block)


@contextlib.contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch norm normalises by the batch, as in the first pass, and leaves its running statistics as that made them."""
    norms = [(m, m.momentum, m.num_batches_tracked) for m in block.modules() if isinstance(m, _BatchNorm)]
    for norm, _, _ in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in norms:
            norm.momentum, norm.num_batches_tracked = momentum, count
