"""Kernels of cross-connection routing (Alg. 2) and its backward, in the tiers that `planning` describes.

`gate` is (weights, b1, w2, b2), where the weights (m, K, C) multiply the pooled paths: W1, or W2 for the linear gate,
where G is 0. `saved` is (gates, scores, pooled, hidden) in the forward, and (gates, hidden) in the backward.
`sizes` is the argument of `extents`. With RELU, X_i is max(x, 0) of the loaded x.

Tile dimensions m, n, K and G are padded to a power of 2. The gates of all paths are one tile, so that each step is one
reduction. Their parameters are loaded before the paths, so that a program waits for memory once.
"""

import triton
import triton.language as tl

from fastroute.backends.triton._tiles import (
    add_products,
    after_previous_launch,
    as_matrix,
    broadcast_channels,
    column,
    extents,
    load_scalars,
    load_tiles,
    maybe_relu,
    sum_parts,
    sums_of,
    tile_of,
    to_matrix,
    to_scalars,
    weighted_sum,
    zero_tile,
    zero_totals,
)
from fastroute.backends.triton.mix import mix_block


@triton.jit
def row_offsets(sample, M: tl.constexpr, COLUMNS: tl.constexpr):
    """Return offsets and mask [m, columns] of one sample of a tensor (N, m, columns)."""
    i = tl.arange(0, triton.next_power_of_2(M))[:, None]
    k = tl.arange(0, triton.next_power_of_2(COLUMNS))[None, :]
    return (sample * M + i) * COLUMNS + k, (i < M) & (k < COLUMNS)


@triton.jit
def load_rows(values, sample, M: tl.constexpr, COLUMNS: tl.constexpr):
    """Load one sample of a tensor (N, m, columns), with zeros beyond its edges; all zeros if it is None."""
    if values is None:
        return tl.zeros([triton.next_power_of_2(M), triton.next_power_of_2(COLUMNS)], tl.float32)
    else:
        offsets, mask = row_offsets(sample, M, COLUMNS)
        return tl.load(values + offsets, mask=mask, other=0.0)


@triton.jit
def channel_offsets(sample, c0, channels, M: tl.constexpr, BC: tl.constexpr):
    """Return offsets and mask [C, m] of one sample of a tensor (N, m, C), from channel c0."""
    c = c0 + tl.arange(0, BC)[:, None]
    i = tl.arange(0, triton.next_power_of_2(M))[None, :]
    return (sample * M + i) * channels + c, (c < channels) & (i < M)


@triton.jit
def weight_tile(w, c0, channels, M: tl.constexpr, K: tl.constexpr, BC: tl.constexpr):
    """Load the columns of w (m, K, C) from c0 as [C, m, K], with zeros beyond its edges."""
    c = c0 + tl.arange(0, BC)[:, None, None]
    i = tl.arange(0, triton.next_power_of_2(M))[None, :, None]
    k = tl.arange(0, triton.next_power_of_2(K))[None, None, :]
    return tl.load(w + (i * K + k) * channels + c, mask=(c < channels) & (i < M) & (k < K), other=0.0)


@triton.jit
def score_weights(w2, M: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """Load w2 (m, n, G), with zeros beyond its edges; for the linear gate one zero: Triton 3.6 cannot return None."""
    if G == 0:
        return tl.zeros([1], tl.float32)
    else:
        i = tl.arange(0, triton.next_power_of_2(M))[:, None, None]
        j = tl.arange(0, triton.next_power_of_2(N))[None, :, None]
        k = tl.arange(0, triton.next_power_of_2(G))[None, None, :]
        return tl.load(w2 + (i * N + j) * G + k, mask=(i < M) & (j < N) & (k < G), other=0.0)


@triton.jit
def score_parameters(gate, M: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """Load b1 [m, G], w2 [m, n, G] and b2 [m, n]."""
    _, b1, w2, b2 = gate
    return load_rows(b1 if G else None, 0, M, G if G else 1), score_weights(w2, M, N, G), load_rows(b2, 0, M, N)


@triton.jit
def gates_of(projected, parameters, N: tl.constexpr, G: tl.constexpr):
    """Compute gates [m, n], scores [m, n] and H [m, G] of a sample from w·Z [m, K]."""
    b1, w2, b2 = parameters
    if G == 0:
        h = b1
        a = projected + b2  # Eq. 3.9
    else:
        h = projected + b1
        h = tl.where(h < 0, 0.0, h)  # a maximum with 0 would hide a NaN
        a = tl.sum(w2 * h[:, None, :], 2) + b2  # Eq. 3.4
    bounded = tl.where(tl.arange(0, triton.next_power_of_2(N))[None, :] < N, a, float("-inf"))
    e = tl.exp(bounded - tl.max(bounded, 1)[:, None])
    return tl.div_rn(e, tl.broadcast_to(tl.sum(e, 1)[:, None], e.shape)), a, h  # Eq. 3.5


@triton.jit
def gate_scalars(gates, M: tl.constexpr, N: tl.constexpr):
    return to_scalars(tl.reshape(gates, [gates.shape[0] * gates.shape[1]]), M, N, gates.shape[1])


@triton.jit
def store_gates(routing, sample, saved, M: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    g, a, h = routing
    gates, scores, _, hidden = saved
    at, mask = row_offsets(sample, M, N)
    tl.store(gates + at, g, mask=mask)
    tl.store(scores + at, a, mask=mask)
    if G:
        at, mask = row_offsets(sample, M, G)
        tl.store(hidden + at, h, mask=mask)


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


@triton.jit
def part_corner(part, blocks, span, space, BC: tl.constexpr):
    """Return the first channel, the first position and the end position of a part; parts go span by span."""
    start = (part // blocks) * span
    return (part % blocks) * BC, start, tl.minimum(start + span, space)


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


@triton.jit
def load_saved(gate, saved, incoming, sample, M: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """Load the inputs of `gates_bwd`: gates and incoming gradients as scalars, w2 as n × [m, G], H [m, G]."""
    _, _, w2, _ = gate
    gates, hidden = saved
    incoming_gates, incoming_scores = incoming
    row = sample * (M * N)
    g = load_scalars(gates + row, M * N)
    grad_gates, grad_scores = (), ()
    if incoming_gates is not None:
        grad_gates = load_scalars(incoming_gates + row, M * N)
    if incoming_scores is not None:
        grad_scores = load_scalars(incoming_scores + row, M * N)
    columns = ()
    if G:
        i = tl.arange(0, triton.next_power_of_2(M))[:, None]
        k = tl.arange(0, triton.next_power_of_2(G))[None, :]
        for j in tl.static_range(N):
            columns += (tl.load(w2 + (i * N + j) * G + k, mask=(i < M) & (k < G), other=0.0),)
    return g, grad_gates, grad_scores, columns, load_rows(hidden if G else None, sample, M, G if G else 1)


@triton.jit
def gates_bwd(products, loaded, M: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """Compute the gradients of the scores [m, n] and of w·Z [m, K] of a sample, from the m·n scalars <dY_j, X_i>.

    Every thread computes the gradients of all scores: this is cheaper than to distribute them.
    """
    g, grad_gates, grad_scores, w2, h = loaded
    da = ()
    for i in tl.static_range(M):
        d_gates = ()
        for j in tl.static_range(N):
            d = products[i * N + j]
            if len(grad_gates) > 0:
                d += grad_gates[i * N + j]
            d_gates += (d,)
        inner = g[i * N] * d_gates[0]
        for j in tl.static_range(1, N):
            inner += g[i * N + j] * d_gates[j]
        for j in tl.static_range(N):
            d = g[i * N + j] * (d_gates[j] - inner)  # Eq. 3.12, with J of 3.13 multiplied out
            if len(grad_scores) > 0:
                d += grad_scores[i * N + j]
            da += (d,)
    d_scores = to_matrix(da, M, N, 0, N)
    if G == 0:
        return d_scores, d_scores
    else:
        dh = w2[0] * to_matrix(da, M, 1, 0, N)
        for j in tl.static_range(1, N):
            dh += w2[j] * to_matrix(da, M, 1, j, N)
        return d_scores, tl.where(h > 0, dh, 0.0)


@triton.jit
def store_gates_bwd(d_routing, sample, d_saved, M: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    da, d_projected = d_routing
    d_scores, d_hidden = d_saved
    at, mask = row_offsets(sample, M, N)
    tl.store(d_scores + at, da, mask=mask)
    if G:
        at, mask = row_offsets(sample, M, G)
        tl.store(d_hidden + at, d_projected, mask=mask)


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
