"""Kernels of cross-connection routing (Alg. 2), in the tiers that `planning` describes.

`gate` and `saved` are those of `_gates`, and `sizes` is the argument of `extents`. With RELU, X_i is max(x, 0) of the
loaded x. Gate parameters are loaded before the paths, so that a program waits for memory once.
"""

import triton
import triton.language as tl

from fastroute.backends.triton._gates import (
    channel_offsets,
    gate_scalars,
    gates_of,
    score_parameters,
    store_gates,
    weight_tile,
)
from fastroute.backends.triton._tiles import (
    after_previous_launch,
    as_matrix,
    extents,
    load_tiles,
    part_corner,
    sums_of,
    tile_of,
    weighted_sum,
    zero_tile,
)
from fastroute.backends.triton.mix import mix_block


@triton.jit
def partial_means(tiles, space, BC: tl.constexpr, BS: tl.constexpr, LAYOUT: tl.constexpr):
    """Return the sums of tiles over their positions, divided by the number of all positions: parts of means [C, m]."""
    grouped = ()
    for i in tl.static_range(len(tiles)):
        grouped += (as_matrix(tiles[i], space, BC, BS, LAYOUT).to(tl.float32),)
    return tl.div_rn(sums_of(grouped, 1), tl.cast(space, tl.float32))  # Eq. 3.3


@triton.jit
def pool(
    xs,
    x_strides,
    sample,
    c0,
    start,
    stop,
    sizes,
    BC: tl.constexpr,
    BS: tl.constexpr,
    LAYOUT: tl.constexpr,
    RELU: tl.constexpr,
):
    """Compute the part of one sample's Z [C, m] from the positions start to stop, for the channels from c0."""
    totals = ()
    for _ in tl.static_range(len(xs)):
        totals += (zero_tile(BC, BS, LAYOUT),)
    for s0 in range(start, stop, BS):
        corner, offsets, mask = tile_of(c0, s0, sizes, BC, BS, LAYOUT)
        x = load_tiles(xs, x_strides, sample, corner + offsets, mask, "", RELU)
        new = ()
        for i in tl.static_range(len(xs)):
            new += (totals[i] + x[i].to(tl.float32),)
        totals = new
    return partial_means(totals, sizes[1], BC, BS, LAYOUT)


@triton.jit
def cross_connect_resident_fwd_kernel(
    xs,
    x_strides,
    ys,
    gate,
    saved,
    sizes,
    RELU: tl.constexpr,
    G: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    M: tl.constexpr = len(xs)
    N: tl.constexpr = len(ys)
    sizes = extents(sizes, UNIT, LAYOUT)
    channels, space, size = sizes
    sample = tl.program_id(0).to(tl.int64)
    weights, _, _, _ = gate
    _, _, pooled, _ = saved
    w = weight_tile(weights, 0, channels, M, G if G else N, BC)
    parameters = score_parameters(gate, M, N, G)
    _, offsets, mask = tile_of(0, 0, sizes, BC, BS, LAYOUT)
    x = load_tiles(xs, x_strides, sample, offsets, mask, "evict_first", RELU)  # m × [C, S]
    z = partial_means(x, space, BC, BS, LAYOUT)  # [C, m]
    routing = gates_of(tl.sum(w * z[:, :, None], 0), parameters, N, G)
    gates, _, _ = routing
    g = gate_scalars(gates, M, N)
    for j in tl.static_range(N):
        tl.store(ys[j] + sample * size + offsets, weighted_sum(x, g, j, N), mask=mask)  # Eq. 3.7
    at, inside = channel_offsets(sample, 0, channels, M, BC)  # last: the outputs do not wait for it
    tl.store(pooled + at, z, mask=inside)
    store_gates(routing, sample, saved, M, N, G)


@triton.jit
def cross_connect_fused_fwd_kernel(
    xs,
    x_strides,
    ys,
    gate,
    saved,
    sizes,
    RELU: tl.constexpr,
    G: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    M: tl.constexpr = len(xs)
    N: tl.constexpr = len(ys)
    K: tl.constexpr = G if G else N
    sizes = extents(sizes, UNIT, LAYOUT)
    channels, space, size = sizes
    sample = tl.program_id(0).to(tl.int64)
    weights, _, _, _ = gate
    _, _, pooled, _ = saved
    parameters = score_parameters(gate, M, N, G)
    products = tl.zeros([BC, triton.next_power_of_2(M), triton.next_power_of_2(K)], tl.float32)
    for c0 in range(0, channels, BC):
        w = weight_tile(weights, c0, channels, M, K, BC)
        z = pool(xs, x_strides, sample, c0, 0, space, sizes, BC, BS, LAYOUT, RELU)
        at, inside = channel_offsets(sample, c0, channels, M, BC)
        tl.store(pooled + at, z, mask=inside)
        products += w * z[:, :, None]
    routing = gates_of(tl.sum(products, 0), parameters, N, G)
    store_gates(routing, sample, saved, M, N, G)
    gates, _, _ = routing
    g = gate_scalars(gates, M, N)
    for start in range(0, size, BLOCK):
        mix_block(xs, x_strides, ys, g, sample, size, start, BLOCK, RELU)


@triton.jit(do_not_specialize=["first"])
def cross_connect_pool_fwd_kernel(
    xs,
    x_strides,
    sums,
    sizes,
    blocks,
    span,
    first,
    RELU: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Write one part's sums for Z of one path to sums (N, m, spans, C)."""
    after_previous_launch(CHAINED)
    M: tl.constexpr = len(xs)
    sizes = extents(sizes, UNIT, LAYOUT)
    channels, space, _ = sizes
    sample = tl.program_id(0).to(tl.int64) + first
    part, parts = tl.program_id(1), tl.num_programs(1)
    c0, start, stop = part_corner(part, blocks, span, space, BC)
    c = c0 + tl.arange(0, BC)[:, None]
    for i in tl.static_range(M):
        if tl.program_id(2) == i:
            z = pool((xs[i],), (x_strides[i],), sample, c0, start, stop, sizes, BC, BS, LAYOUT, RELU)  # [C, 1]
            row = (sample * M + i) * (parts // blocks) + part // blocks
            tl.store(sums + row * channels + c, z, mask=c < channels)


@triton.jit(do_not_specialize=["first"])
def cross_connect_gate_fwd_kernel(
    sums,
    gate,
    saved,
    spans,
    channels,
    first,
    M: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    BC: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Compute Z of one sample from its partial sums (N, m, spans, C), and the gates; Z is stored if spans > 1."""
    P: tl.constexpr = triton.next_power_of_2(M)
    K: tl.constexpr = G if G else N
    sample = tl.program_id(0).to(tl.int64) + first
    weights, _, _, _ = gate
    _, _, pooled, _ = saved
    parameters = score_parameters(gate, M, N, G)
    products = tl.zeros([BC, P, triton.next_power_of_2(K)], tl.float32)
    for c0 in range(0, channels, BC):
        w = weight_tile(weights, c0, channels, M, K, BC)
        after_previous_launch(CHAINED)
        i = tl.arange(0, P)[None, None, :]
        c = c0 + tl.arange(0, BC)[None, :, None]
        total = tl.zeros([PARTS, BC, P], tl.float32)
        for part0 in range(0, spans, PARTS):
            part = part0 + tl.arange(0, PARTS)[:, None, None]
            row = (sample * M + i) * spans + part
            total += tl.load(sums + row * channels + c, mask=(part < spans) & (c < channels) & (i < M), other=0.0)
        z = tl.sum(total, 0)  # [C, m]
        at, inside = channel_offsets(sample, c0, channels, M, BC)
        tl.store(pooled + at, z, mask=inside & (spans > 1))
        products += w * z[:, :, None]
    store_gates(gates_of(tl.sum(products, 0), parameters, N, G), sample, saved, M, N, G)
