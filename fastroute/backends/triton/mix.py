"""The cross-path weighted sum (Eq. 3.7) and its backward, each in one pass over the paths."""

import math

import torch
import triton
import triton.language as tl

from fastroute.backends.triton import planning
from fastroute.backends.triton._recording import launch
from fastroute.backends.triton._tiles import (
    add_products,
    after_previous_launch,
    batch_strides,
    load_scalars,
    load_tiles,
    sum_parts,
    sums_of,
    weighted_sum,
    zero_totals,
)
from fastroute.ops._paths import empty_path


@triton.jit
def mix_block(xs, x_strides, ys, g, sample, size, start, BLOCK: tl.constexpr, RELU: tl.constexpr):
    """Compute one block of every output; g holds the m·n gates of the sample as scalars."""
    at = start + tl.arange(0, BLOCK)
    mask = at < size
    x = load_tiles(xs, x_strides, sample, at, mask, "evict_first", RELU)  # m × [C·S]
    for j in tl.static_range(len(ys)):
        tl.store(ys[j] + sample * size + at, weighted_sum(x, g, j, len(ys)), mask=mask)  # Eq. 3.7


@triton.jit(do_not_specialize=["first"])
def mix_fwd_kernel(
    xs,
    x_strides,
    ys,
    gates,
    first,
    size,
    portion,
    STATIC: tl.constexpr,
    BLOCK: tl.constexpr,
    RELU: tl.constexpr,
    CHAINED: tl.constexpr,
):
    after_previous_launch(CHAINED)
    COUNT: tl.constexpr = len(xs) * len(ys)
    sample = tl.program_id(0).to(tl.int64) + first
    g = load_scalars(gates if STATIC else gates + sample * COUNT, COUNT)
    start = tl.program_id(1).to(tl.int64) * portion
    for block in range(start, tl.minimum(start + portion, size), BLOCK):
        mix_block(xs, x_strides, ys, g, sample, size, block, BLOCK, RELU)


@triton.jit(do_not_specialize=["first"])
def mix_bwd_kernel(
    xs,
    x_strides,
    dys,
    dy_strides,
    dxs,
    gates,
    partials,
    first,
    size,
    portion,
    STATIC: tl.constexpr,
    GRAD_INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVICT_DY: tl.constexpr,
    RELU: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Write <dY_j, X_i> of one portion of a sample to partials (N, parts, m, n), and with GRAD_INPUTS its dX."""
    after_previous_launch(CHAINED)
    M: tl.constexpr = len(xs)
    N: tl.constexpr = len(dys)
    sample = tl.program_id(0).to(tl.int64) + first
    if GRAD_INPUTS:
        g = load_scalars(gates if STATIC else gates + sample * (M * N), M * N)
    totals = zero_totals(M * N, BLOCK)
    start = tl.program_id(1).to(tl.int64) * portion
    for block in range(start, tl.minimum(start + portion, size), BLOCK):
        at = block + tl.arange(0, BLOCK)
        mask = at < size
        x = load_tiles(xs, x_strides, sample, at, mask, "evict_first", RELU)  # m × [C·S]
        dy = load_tiles(dys, dy_strides, sample, at, mask, EVICT_DY)  # n × [C·S]
        totals = add_products(totals, x, dy)  # Eq. 3.10
        if GRAD_INPUTS:
            for i in tl.static_range(M):
                tl.store(dxs[i] + sample * size + at, weighted_sum(dy, g, i * N, 1), mask=mask)
    row = sample * tl.num_programs(1) + tl.program_id(1)
    sums = sums_of(totals, 0)
    k = tl.arange(0, triton.next_power_of_2(M * N))
    tl.store(partials + row * (M * N) + k, sums, mask=k < M * N)


@triton.jit
def sum_parts_kernel(values, out, parts, columns, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    total = sum_parts(values + row * parts * columns, parts, columns, first, COLUMNS, PARTS)
    column = first + tl.arange(0, COLUMNS)
    tl.store(out + row * columns + column, total, mask=column < columns)


def launch_sum_parts(values: torch.Tensor, out: torch.Tensor, rows: int, parts: int, columns: int) -> None:
    """Launch the sum of values (rows, parts, columns) over the parts, into out (rows, columns)."""
    tile = planning.partial_sums(parts, columns)
    launch(sum_parts_kernel, (rows, triton.cdiv(columns, tile["COLUMNS"])))(values, out, parts, columns, **tile)


def mix(xs, gates):
    x, n = xs[0], gates.shape[-1]
    outputs = [empty_path(x) for _ in range(n)]
    if x.shape[0] == 0:
        return outputs
    size = math.prod(x.shape[1:])
    settings = planning.elementwise(len(xs), n, size, x.itemsize, backward=False)
    registers = planning.max_registers(len(xs), n)
    with torch.cuda.device_of(x):
        launch(mix_fwd_kernel, (x.shape[0], triton.cdiv(size, settings.portion)))(
            tuple(xs),
            batch_strides(xs),
            tuple(outputs),
            gates.float().contiguous(),
            0,
            size,
            settings.portion,
            STATIC=gates.dim() == 2,
            BLOCK=settings.block,
            RELU=False,
            CHAINED=False,
            num_warps=settings.num_warps,
            maxnreg=registers,
        )
    return outputs


def mix_backward(grad_outputs, xs, gates, grad_inputs):
    x, m, n = xs[0], len(xs), len(grad_outputs)
    grad_xs = [empty_path(x) for _ in xs] if grad_inputs else []
    grad_gates = gates.new_empty(gates.shape, dtype=torch.float32)
    if x.shape[0] == 0:
        return grad_xs, grad_gates.zero_()  # gates (m, n) have a gradient even for an empty batch
    size, static = math.prod(x.shape[1:]), gates.dim() == 2
    settings = planning.elementwise(m, n, size, x.itemsize, backward=True)
    parts = triton.cdiv(size, settings.portion)
    whole = parts == 1 and not static
    partials = grad_gates if whole else gates.new_empty((x.shape[0], parts, m, n), dtype=torch.float32)
    registers = planning.max_registers(len(xs), n)
    with torch.cuda.device_of(x):
        launch(mix_bwd_kernel, (x.shape[0], parts))(
            tuple(xs),
            batch_strides(xs),
            tuple(grad_outputs),
            batch_strides(grad_outputs),
            tuple(grad_xs if grad_inputs else xs),
            gates.float().contiguous(),
            partials,
            0,
            size,
            settings.portion,
            STATIC=static,
            GRAD_INPUTS=grad_inputs,
            BLOCK=settings.block,
            EVICT_DY="evict_first",
            RELU=False,
            CHAINED=False,
            num_warps=settings.num_warps,
            maxnreg=registers,
        )
        if not whole:
            # One program adds the partial sums of a gate in the order of the samples, so that results are bitwise
            # reproducible, unlike with atomics.
            rows, parts = (1, x.shape[0] * parts) if static else (x.shape[0], parts)
            launch_sum_parts(partials, grad_gates, rows, parts, m * n)
    return grad_xs, grad_gates
