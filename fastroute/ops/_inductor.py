"""Rules for the operators in Inductor, the compiler of `torch.compile`."""

import sys
from collections.abc import Callable, Iterable
from functools import cache


@cache
def add_decompositions(table: Callable[[], dict[Callable, Callable]]) -> None:
    """Add operators to those that Inductor decomposes. This imports Inductor, which takes seconds."""
    from torch._inductor import decomposition

    found = table()
    decomposition.decompositions.update(found)
    decomposition.fast_random_decomps().update(found)  # a copy, which another compilation may have made


def let_maps_be_channels_last(operators: Callable[[], Iterable[Callable]]) -> None:
    """Let maps be channels_last where Inductor computes a graph's convolutions in that layout, as it does on a CPU.

    By default, Inductor gives an operator its maps in the layout of the eager network. Each router would then convert
    all paths twice, in the forward and in the backward. Do nothing while Inductor is not imported: importing it takes
    seconds, and other compilers do not need this.
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
        # layout_opt is False in a backward, which has no forward convolutions. Its forward may have saved paths in
        # several layouts, and an operator needs all of them in one.
        if not (V.graph.layout_opt or any(map(is_channels_last, filter(is_map, pytree.tree_leaves(args))))):
            return lowering.constrain_to_fx_strides(node, *args, **kwargs)
        require = ir.ExternKernel.require_channels_last
        return pytree.tree_map(lambda argument: require(argument) if is_map(argument) else argument, args), kwargs

    for operator in operators():
        lowering.make_fallback(operator, constrain, warn=False)
