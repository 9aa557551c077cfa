"""What Inductor, `torch.compile`'s compiler, is told of the operators, once it has been imported."""

import sys
from collections.abc import Callable, Iterable
from functools import cache


@cache
def add_decompositions(table: Callable[[], dict[Callable, Callable]]) -> None:
    """Add operators to those that Inductor decomposes. Importing it takes seconds, so not before a compilation."""
    from torch._inductor import decomposition

    decomposition.decompositions.update(table())
    decomposition.fast_random_decomps().update(table())  # a copy, which another compilation may have made


def let_maps_be_channels_last(operators: Callable[[], Iterable[Callable]]) -> None:
    """Let maps be channels_last where Inductor computes a graph's convolutions so, as it does on a CPU.

    Else an operator, which is one node of the graph, would have its maps in the layout of the eager network, and each
    router would convert all paths twice, forward and backward. Only once Inductor is imported: others need none of it.
    """
    if "torch._inductor.lowering" in sys.modules:
        _constrain_layouts(operators)


@cache
def _constrain_layouts(operators: Callable[[], Iterable[Callable]]) -> None:
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V
    from torch.utils import _pytree as pytree

    def is_map(argument):
        return isinstance(argument, ir.TensorBox) and len(argument.get_size()) == 4

    def is_channels_last(argument):
        strides = argument.maybe_get_stride()
        return strides is not None and strides[1] == 1

    def constrain(node, *args, **kwargs):
        # The backward has none of the convolutions that decide, but what they saved; all paths need one layout.
        if not (V.graph.layout_opt or any(map(is_channels_last, filter(is_map, pytree.tree_leaves(args))))):
            return lowering.constrain_to_fx_strides(node, *args, **kwargs)
        require = ir.ExternKernel.require_channels_last
        return pytree.tree_map(lambda argument: require(argument) if is_map(argument) else argument, args), kwargs

    for operator in operators():
        lowering.make_fallback(operator, constrain, warn=False)
