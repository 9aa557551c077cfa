"""Kernels of the backward of cross-connection routing, in the tiers that `planning` describes.

`gate` and `saved` are those of `_gates`, and `sizes` is the argument of `extents`. With RELU, X_i is max(x, 0) of the
loaded x. Gate parameters are loaded before the paths, so that a program waits for memory once.
"""

import triton
import triton.language as tl

from fastroute.backends.triton._gates import channel_offsets, gates_bwd, load_saved, store_gates_bwd, weight_tile
from fastroute.backends.triton._tiles import (
    add_products,
    after_previous_launch,
    broadcast_channels,
    column,
    extents,
    load_scalars,
    load_tiles,
    maybe_relu,
    part_corner,
    sum_parts,
    sums_of,
    tile_of,
    to_scalars,
    weighted_sum,
    zero_totals,
)


@triton.jit
def shares_of(d_projected, w, space):
    """Return the gradient [C, m] of each position through the pooling (second term of Eq. 3.15), from w [C, m, K]."""
    return tl.div_rn(tl.sum(w * d_projected[None, :, :], 2), tl.cast(space, tl.float32))


@triton.jit
def broadcast_columns(shares, space, M: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, LAYOUT: tl.constexpr):
    """Return each column of [C, m] in a shape that broadcasts over a tile."""
    columns = ()
    for i in tl.static_range(M):
        columns += (broadcast_channels(column(shares, i), space, BC, BS, LAYOUT),)
    return columns


@triton.jit
def store_grad_inputs(xs, x_strides, dxs, dy, g, shares, sample, size, offsets, mask, RELU: tl.constexpr):
    """Store one tile of dX_i = Σ_j g_ij dY_j + share_i (Eq. 3.15); with RELU, 0 unless x > 0."""
    for i in tl.static_range(len(dxs)):
        dx = weighted_sum(dy, g, i * len(dy), 1) + shares[i]
        if RELU:
            x = tl.load(xs[i] + sample * x_strides[i] + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
            dx = tl.where(x > 0, dx, 0.0)
        tl.store(dxs[i] + sample * size + offsets, dx, mask=mask)


@triton.jit
def walk_grad_inputs(
    xs,
    x_strides,
    dys,
    dy_strides,
    dxs,
    g,
    shares,
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
    """Store dX of every path, for the channels from c0 and the positions start to stop."""
    for s0 in range(start, stop, BS):
        corner, offsets, mask = tile_of(c0, s0, sizes, BC, BS, LAYOUT)
        dy = load_tiles(dys, dy_strides, sample, corner + offsets, mask, "evict_first")  # n × [C, S]
        store_grad_inputs(xs, x_strides, dxs, dy, g, shares, sample, sizes[2], corner + offsets, mask, RELU)


@triton.jit
def inner_products(totals):
    """Return the sums of one-dimensional tiles as scalars."""
    return to_scalars(sums_of(totals, 0), 1, len(totals), 1)


@triton.jit
def cross_connect_resident_bwd_kernel(
    xs,
    x_strides,
    dys,
    dy_strides,
    dxs,
    gate,
    saved,
    incoming,
    d_saved,
    sizes,
    GRAD_INPUTS: tl.constexpr,
    RELU: tl.constexpr,
    G: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    M: tl.constexpr = len(xs)
    N: tl.constexpr = len(dys)
    sizes = extents(sizes, UNIT, LAYOUT)
    channels, space, size = sizes
    sample = tl.program_id(0).to(tl.int64)
    weights, _, _, _ = gate
    loaded = load_saved(gate, saved, incoming, sample, M, N, G)
    if GRAD_INPUTS:
        w = weight_tile(weights, 0, channels, M, G if G else N, BC)
    _, offsets, mask = tile_of(0, 0, sizes, BC, BS, LAYOUT)
    dy = load_tiles(dys, dy_strides, sample, offsets, mask, "evict_first")  # n × [C, S]
    products = ()
    for i in tl.static_range(M):
        x = tl.load(xs[i] + sample * x_strides[i] + offsets, mask=mask, other=0.0)
        x = maybe_relu(x, RELU).to(tl.float32)  # [C, S]
        for j in tl.static_range(N):
            products += (tl.reshape(x * dy[j].to(tl.float32), [BC * BS], can_reorder=True),)  # Eq. 3.10
    d_routing = gates_bwd(inner_products(products), loaded, M, N, G)
    if GRAD_INPUTS:
        g, _, _, _, _ = loaded
        _, d_projected = d_routing
        shares = broadcast_columns(shares_of(d_projected, w, space), space, M, BC, BS, LAYOUT)
        store_grad_inputs(xs, x_strides, dxs, dy, g, shares, sample, size, offsets, mask, RELU)
    store_gates_bwd(d_routing, sample, d_saved, M, N, G)


@triton.jit
def cross_connect_fused_bwd_kernel(
    xs,
    x_strides,
    dys,
    dy_strides,
    dxs,
    gate,
    saved,
    incoming,
    d_saved,
    sizes,
    GRAD_INPUTS: tl.constexpr,
    RELU: tl.constexpr,
    G: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    M: tl.constexpr = len(xs)
    N: tl.constexpr = len(dys)
    sizes = extents(sizes, UNIT, LAYOUT)
    channels, space, size = sizes
    sample = tl.program_id(0).to(tl.int64)
    weights, _, _, _ = gate
    loaded = load_saved(gate, saved, incoming, sample, M, N, G)
    totals = zero_totals(M * N, BLOCK)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = load_tiles(xs, x_strides, sample, at, at < size, "evict_first", RELU)  # m × [C·S]
        dy = load_tiles(dys, dy_strides, sample, at, at < size, "")  # n × [C·S]
        totals = add_products(totals, x, dy)  # Eq. 3.10
    d_routing = gates_bwd(inner_products(totals), loaded, M, N, G)
    store_gates_bwd(d_routing, sample, d_saved, M, N, G)
    if GRAD_INPUTS:
        g, _, _, _, _ = loaded
        _, d_projected = d_routing
        for c0 in range(0, channels, BC):
            shares = shares_of(d_projected, weight_tile(weights, c0, channels, M, G if G else N, BC), space)
            shares = broadcast_columns(shares, space, M, BC, BS, LAYOUT)
            walk_grad_inputs(
                xs, x_strides, dys, dy_strides, dxs, g, shares, sample, c0, 0, space, sizes, BC, BS, LAYOUT, RELU
            )


@triton.jit(do_not_specialize=["first"])
def cross_connect_gate_bwd_kernel(
    partials,
    gate,
    saved,
    incoming,
    d_saved,
    shares,
    parts,
    channels,
    space,
    first,
    M: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    BC: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Compute dA and dH of one sample from partial inner products (N, parts, m, n); shares (N, m, C) may be None."""
    sample = tl.program_id(0).to(tl.int64) + first
    weights, _, _, _ = gate
    loaded = load_saved(gate, saved, incoming, sample, M, N, G)
    after_previous_launch(CHAINED)
    sums = sum_parts(partials + sample * parts * (M * N), parts, M * N, 0, triton.next_power_of_2(M * N), PARTS)
    d_routing = gates_bwd(to_scalars(sums, 1, M * N, 1), loaded, M, N, G)
    store_gates_bwd(d_routing, sample, d_saved, M, N, G)
    if shares is not None:
        _, d_projected = d_routing
        for c0 in range(0, channels, BC):
            at, inside = channel_offsets(sample, c0, channels, M, BC)
            share = shares_of(d_projected, weight_tile(weights, c0, channels, M, G if G else N, BC), space)
            tl.store(shares + at, share, mask=inside)


@triton.jit(do_not_specialize=["first"])
def cross_connect_inputs_bwd_kernel(
    xs,
    x_strides,
    dys,
    dy_strides,
    dxs,
    gates,
    shares,
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
    """Compute dX of one part, from the gates and shares (N, m, C), the gradient of a position through the pooling."""
    after_previous_launch(CHAINED)
    M: tl.constexpr = len(dxs)
    sizes = extents(sizes, UNIT, LAYOUT)
    channels, space, _ = sizes
    sample = tl.program_id(0).to(tl.int64) + first
    g = load_scalars(gates + sample * (M * len(dys)), M * len(dys))
    c0, start, stop = part_corner(tl.program_id(1), blocks, span, space, BC)
    c = c0 + (tl.arange(0, BC * BS) // space if LAYOUT == "flat" else tl.arange(0, BC)[:, None])
    loaded = ()
    for i in tl.static_range(M):
        loaded += (tl.load(shares + (sample * M + i) * channels + c, mask=c < channels, other=0.0),)
    walk_grad_inputs(
        xs, x_strides, dys, dy_strides, dxs, g, loaded, sample, c0, start, stop, sizes, BC, BS, LAYOUT, RELU
    )


@triton.jit
def outer_sum(
    left,
    right,
    out,
    bias,
    tile,
    i,
    batch,
    m,
    rows,
    columns,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute a tile of out[i] = Σ_s left[s, i] right[s, i]ᵀ; tiles of column 0 also bias[i] = Σ_s left[s, i]."""
    across = tl.cdiv(columns, COLUMNS)
    r = (tile // across) * ROWS + tl.arange(0, ROWS)
    c = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([SAMPLES, ROWS, COLUMNS], tl.float32)
    bias_total = tl.zeros([SAMPLES, ROWS], tl.float32)
    for s0 in range(0, batch, SAMPLES):
        s = s0 + tl.arange(0, SAMPLES)[:, None]
        row = s.to(tl.int64) * m + i
        a = tl.load(left + row * rows + r[None, :], mask=(s < batch) & (r[None, :] < rows), other=0.0)  # [N, rows]
        b = tl.load(right + row * columns + c[None, :], mask=(s < batch) & (c[None, :] < columns), other=0.0)
        total += a[:, :, None] * b[:, None, :]  # [N, rows, columns]
        bias_total += a
    at = i * rows + r
    mask = (r[:, None] < rows) & (c[None, :] < columns)
    tl.store(out + at[:, None] * columns + c[None, :], tl.sum(total, 0), mask=mask)
    tl.store(bias + at, tl.sum(bias_total, 0), mask=(r < rows) & (tile % across == 0))


@triton.jit
def cross_connect_weights_bwd_kernel(
    d_saved,
    pooled,
    hidden,
    grads,
    tiles,
    batch,
    m,
    n,
    channels,
    G: tl.constexpr,
    SAMPLES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Compute the gradients of all parameters (Eq. 3.14): each program one tile of W1 or, from `tiles` on, of W2.

    A program sums over all samples in order, so that results are bitwise reproducible, unlike with atomics. A library's
    matrix product may be set to round to TF32.
    """
    d_scores, d_hidden = d_saved
    grad_w1, grad_b1, grad_w2, grad_b2 = grads
    tile, i = tl.program_id(0), tl.program_id(1)
    if G == 0:
        outer_sum(d_scores, pooled, grad_w2, grad_b2, tile, i, batch, m, n, channels, SAMPLES, ROWS, COLUMNS)
    else:
        if tile < tiles:
            outer_sum(d_hidden, pooled, grad_w1, grad_b1, tile, i, batch, m, G, channels, SAMPLES, ROWS, COLUMNS)
        else:
            outer_sum(d_scores, hidden, grad_w2, grad_b2, tile - tiles, i, batch, m, n, G, SAMPLES, ROWS, COLUMNS)
