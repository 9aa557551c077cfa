"""The kernels of cross-connection routing (Alg. 2) and its backward, in the tiers that `launch_tables` describes.

In them, `gate` is (w, b1, w2, b2), w (m, K, C) being what multiplies the pooled paths: W1, or W2 of the linear gate,
for which G is 0. `sizes` is (channels, space, channels · space). With RELU, X_i is max(x, 0) of what is loaded.
"""

import triton
import triton.language as tl

from fastroute.backends.triton._tiles import (
    add_products,
    entries,
    load_scalars,
    load_tiles,
    rectified,
    sum_parts,
    tile_of,
    weighted_sum,
    zero_totals,
)
from fastroute.backends.triton.mix import mix_block


@triton.jit
def weight_tile(w, i, c0, channels, K: tl.constexpr, BC: tl.constexpr):
    """The columns from c0 on of path i's matrix in w (m, K, C), zero beyond its edges."""
    k = tl.arange(0, triton.next_power_of_2(K))[:, None]
    c = c0 + tl.arange(0, BC)[None, :]
    return tl.load(w + (i * K + k) * channels + c, mask=(k < K) & (c < channels), other=0.0)  # [K, C]


@triton.jit
def score_weights(w2, i, N: tl.constexpr, G: tl.constexpr):
    """Path i's matrix in w2 (m, n, G), zero beyond its edges."""
    j = tl.arange(0, triton.next_power_of_2(N))[:, None]
    k = tl.arange(0, triton.next_power_of_2(G))[None, :]
    return tl.load(w2 + (i * N + j) * G + k, mask=(j < N) & (k < G), other=0.0)  # [n, G]


@triton.jit
def gate_row(projected, sample, i, gate, saved, store, M: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """The n gates of path i as scalars, from w·Z [K]. With `store`, gates, scores and H are written out as well."""
    _, b1, w2, b2 = gate
    gates, scores, _, hidden = saved
    j = tl.arange(0, triton.next_power_of_2(N))
    row = sample * M + i
    if G == 0:
        a = projected  # Eq. 3.9
    else:
        k = tl.arange(0, triton.next_power_of_2(G))
        if b1 is not None:
            projected += tl.load(b1 + i * G + k, mask=k < G, other=0.0)
        h = tl.where(projected < 0, 0.0, projected)  # a maximum with 0 would hide a NaN
        tl.store(hidden + row * G + k, h, mask=(k < G) & store)
        a = tl.sum(score_weights(w2, i, N, G) * h[None, :], 1)  # Eq. 3.4
    if b2 is not None:
        a += tl.load(b2 + i * N + j, mask=j < N, other=0.0)
    tl.store(scores + row * N + j, a, mask=(j < N) & store)
    a = tl.where(j < N, a, float("-inf"))
    e = tl.exp(a - tl.max(a, 0))
    g = tl.div_rn(e, tl.sum(e, 0))  # Eq. 3.5
    tl.store(gates + row * N + j, g, mask=(j < N) & store)
    return entries(g, N)


@triton.jit
def store_pooled(z, sample, i, c0, channels, saved, M: tl.constexpr, BC: tl.constexpr):
    c = c0 + tl.arange(0, BC)
    tl.store(saved[2] + (sample * M + i) * channels + c, z, mask=c < channels)


@triton.jit
def pool(x, c0, start, stop, sizes, BC: tl.constexpr, BS: tl.constexpr, LAST: tl.constexpr, RELU: tl.constexpr):
    """What the positions from start to stop give to Z [C] of one path of one sample, for the channels from c0 on."""
    channels, space, _ = sizes
    total = tl.zeros([BC, BS], tl.float32)
    for s0 in range(start, stop, BS):
        corner, offsets, mask = tile_of(c0, s0, channels, space, BC, BS, LAST)
        total += rectified(tl.load(x + corner + offsets, mask=mask, other=0.0), RELU).to(tl.float32)  # [C, S]
    return tl.div_rn(tl.sum(total, 1), tl.cast(space, tl.float32))  # Eq. 3.3


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
    LAST: tl.constexpr,
):
    M: tl.constexpr = len(xs)
    N: tl.constexpr = len(ys)
    channels, space, size = sizes
    sample = tl.program_id(0).to(tl.int64)
    _, offsets, mask = tile_of(0, 0, channels, space, BC, BS, LAST)
    x = load_tiles(xs, x_strides, sample, offsets, mask, "evict_first", RELU)  # m × [C, S]
    g = ()
    for i in tl.static_range(M):
        z = tl.div_rn(tl.sum(x[i].to(tl.float32), 1), tl.cast(space, tl.float32))  # Eq. 3.3
        store_pooled(z, sample, i, 0, channels, saved, M, BC)
        projected = tl.sum(weight_tile(gate[0], i, 0, channels, G if G else N, BC) * z[None, :], 1)
        g += gate_row(projected, sample, i, gate, saved, True, M, N, G)
    for j in tl.static_range(N):
        tl.store(ys[j] + sample * size + offsets, weighted_sum(x, g, j, N), mask=mask)  # Eq. 3.7


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
    LAST: tl.constexpr,
):
    M: tl.constexpr = len(xs)
    N: tl.constexpr = len(ys)
    K: tl.constexpr = G if G else N
    channels, space, size = sizes
    sample = tl.program_id(0).to(tl.int64)
    g = ()
    for i in tl.static_range(M):
        products = tl.zeros([triton.next_power_of_2(K), BC], tl.float32)
        for c0 in range(0, channels, BC):
            z = pool(xs[i] + sample * x_strides[i], c0, 0, space, sizes, BC, BS, LAST, RELU)
            store_pooled(z, sample, i, c0, channels, saved, M, BC)
            products += weight_tile(gate[0], i, c0, channels, K, BC) * z[None, :]
        g += gate_row(tl.sum(products, 1), sample, i, gate, saved, True, M, N, G)
    for start in range(0, size, BLOCK):
        mix_block(xs, x_strides, ys, g, sample, size, start, BLOCK, RELU)


@triton.jit
def corner_of(part, blocks, span, space, BC: tl.constexpr):
    """First channel, first position and end of the positions of a part: the blocks of channels, span by span."""
    start = (part // blocks) * span
    return (part % blocks) * BC, start, tl.minimum(start + span, space)


@triton.jit(do_not_specialize=["first"])
def cross_connect_pool_fwd_kernel(
    xs,
    x_strides,
    w,
    pooled,
    partials,
    sizes,
    blocks,
    span,
    first,
    RELU: tl.constexpr,
    K: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    LAST: tl.constexpr,
):
    """One part's shares in Z, into pooled (N, m, spans, C), and in w·Z, into partials (N, m, parts, K), for one path.

    Every program that mixes needs w·Z; it adds up these shares, which are a small part of the bytes of w.
    """
    M: tl.constexpr = len(xs)
    channels, space, _ = sizes
    sample = tl.program_id(0).to(tl.int64) + first
    part, parts = tl.program_id(1), tl.num_programs(1)
    c0, start, stop = corner_of(part, blocks, span, space, BC)
    c = c0 + tl.arange(0, BC)
    k = tl.arange(0, triton.next_power_of_2(K))
    for i in tl.static_range(M):
        if tl.program_id(2) == i:
            z = pool(xs[i] + sample * x_strides[i], c0, start, stop, sizes, BC, BS, LAST, RELU)
            row = (sample * M + i) * (parts // blocks) + part // blocks
            tl.store(pooled + row * channels + c, z, mask=c < channels)
            share = tl.sum(weight_tile(w, i, c0, channels, K, BC) * z[None, :], 1)
            tl.store(partials + ((sample * M + i) * parts + part) * K + k, share, mask=k < K)


@triton.jit(do_not_specialize=["first"])
def cross_connect_mix_fwd_kernel(
    xs,
    x_strides,
    ys,
    gate,
    saved,
    partials,
    parts,
    size,
    portion,
    first,
    RELU: tl.constexpr,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gates, by every program anew, and one portion of every output."""
    M: tl.constexpr = len(xs)
    N: tl.constexpr = len(ys)
    K: tl.constexpr = G if G else N
    sample = tl.program_id(0).to(tl.int64) + first
    g = ()
    for i in tl.static_range(M):
        shares = partials + (sample * M + i) * parts * K
        projected = sum_parts(shares, parts, K, 0, triton.next_power_of_2(K), PARTS)
        g += gate_row(projected, sample, i, gate, saved, tl.program_id(1) == 0, M, N, G)
    start = tl.program_id(1).to(tl.int64) * portion
    for block in range(start, tl.minimum(start + portion, size), BLOCK):
        mix_block(xs, x_strides, ys, g, sample, size, block, BLOCK, RELU)


@triton.jit
def gate_row_bwd(
    d_gates, sample, i, w2, saved, incoming, d_saved, store, M: tl.constexpr, N: tl.constexpr, G: tl.constexpr
):
    """The gradient [K] of w·Z of path i, from <dY_j, X_i> [n]. With `store`, dA and dH are written out as well."""
    gates, hidden = saved
    grad_gates, grad_scores = incoming
    d_scores, d_hidden = d_saved
    j = tl.arange(0, triton.next_power_of_2(N))
    at = (sample * M + i) * N + j
    if grad_gates is not None:
        d_gates += tl.load(grad_gates + at, mask=j < N, other=0.0)
    g = tl.load(gates + at, mask=j < N, other=0.0)
    da = g * (d_gates - tl.sum(g * d_gates, 0))  # Eq. 3.12, with J of 3.13 multiplied out
    if grad_scores is not None:
        da += tl.load(grad_scores + at, mask=j < N, other=0.0)
    tl.store(d_scores + at, da, mask=(j < N) & store)
    if G == 0:
        return da
    else:
        k = tl.arange(0, triton.next_power_of_2(G))
        at = (sample * M + i) * G + k
        h = tl.load(hidden + at, mask=k < G, other=0.0)
        dh = tl.where(h > 0, tl.sum(score_weights(w2, i, N, G) * da[:, None], 0), 0.0)
        tl.store(d_hidden + at, dh, mask=(k < G) & store)
        return dh


@triton.jit
def shares_of(d_projected, w, c0, sizes, K: tl.constexpr, BC: tl.constexpr):
    """What each position of path i gets through the pooling, m × [C, 1]: the second term of Eq. 3.15."""
    channels, space, _ = sizes
    shares = ()
    for i in tl.static_range(len(d_projected)):
        dz = tl.sum(weight_tile(w, i, c0, channels, K, BC) * d_projected[i][:, None], 0)
        shares += (tl.div_rn(dz, tl.cast(space, tl.float32))[:, None],)
    return shares


@triton.jit
def store_grad_inputs(xs, x_strides, dxs, dy, g, shares, sample, size, offsets, mask, RELU: tl.constexpr):
    """One tile of dX_i = Σ_j g_ij dY_j + share_i (Eq. 3.15); with RELU, zero where x is not above zero."""
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
    LAST: tl.constexpr,
    RELU: tl.constexpr,
):
    """dX of every path, for the channels from c0 on and the positions from start to stop."""
    channels, space, size = sizes
    for s0 in range(start, stop, BS):
        corner, offsets, mask = tile_of(c0, s0, channels, space, BC, BS, LAST)
        dy = load_tiles(dys, dy_strides, sample, corner + offsets, mask, "evict_first")  # n × [C, S]
        store_grad_inputs(xs, x_strides, dxs, dy, g, shares, sample, size, corner + offsets, mask, RELU)


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
    LAST: tl.constexpr,
):
    M: tl.constexpr = len(xs)
    N: tl.constexpr = len(dys)
    channels, space, size = sizes
    sample = tl.program_id(0).to(tl.int64)
    _, offsets, mask = tile_of(0, 0, channels, space, BC, BS, LAST)
    dy = load_tiles(dys, dy_strides, sample, offsets, mask, "evict_first")  # n × [C, S]
    j = tl.arange(0, triton.next_power_of_2(N))
    d_projected = ()
    for i in tl.static_range(M):
        x = tl.load(xs[i] + sample * x_strides[i] + offsets, mask=mask, other=0.0)
        x = rectified(x, RELU).to(tl.float32)  # [C, S]
        d_gates = tl.zeros([triton.next_power_of_2(N)], tl.float32)
        for k in tl.static_range(N):
            d_gates = tl.where(j == k, tl.sum(x * dy[k].to(tl.float32)), d_gates)  # Eq. 3.10
        d_projected += (gate_row_bwd(d_gates, sample, i, gate[2], saved, incoming, d_saved, True, M, N, G),)
    if GRAD_INPUTS:
        g = load_scalars(saved[0] + sample * (M * N), M * N)
        shares = shares_of(d_projected, gate[0], 0, sizes, G if G else N, BC)
        store_grad_inputs(xs, x_strides, dxs, dy, g, shares, sample, size, offsets, mask, RELU)


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
    LAST: tl.constexpr,
):
    M: tl.constexpr = len(xs)
    N: tl.constexpr = len(dys)
    channels, space, size = sizes
    sample = tl.program_id(0).to(tl.int64)
    totals = zero_totals(M * N, BLOCK)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = load_tiles(xs, x_strides, sample, at, at < size, "evict_first", RELU)  # m × [C·S]
        dy = load_tiles(dys, dy_strides, sample, at, at < size, "")  # n × [C·S]
        totals = add_products(totals, x, dy)  # Eq. 3.10
    j = tl.arange(0, triton.next_power_of_2(N))
    d_projected = ()
    for i in tl.static_range(M):
        d_gates = tl.zeros([triton.next_power_of_2(N)], tl.float32)
        for k in tl.static_range(N):
            d_gates = tl.where(j == k, tl.sum(totals[i * N + k], 0), d_gates)
        d_projected += (gate_row_bwd(d_gates, sample, i, gate[2], saved, incoming, d_saved, True, M, N, G),)
    if GRAD_INPUTS:
        g = load_scalars(saved[0] + sample * (M * N), M * N)
        for c0 in range(0, channels, BC):
            shares = shares_of(d_projected, gate[0], c0, sizes, G if G else N, BC)
            walk_grad_inputs(
                xs, x_strides, dys, dy_strides, dxs, g, shares, sample, c0, 0, space, sizes, BC, BS, LAST, RELU
            )


@triton.jit(do_not_specialize=["first"])
def cross_connect_inputs_bwd_kernel(
    xs,
    x_strides,
    dys,
    dy_strides,
    dxs,
    gate,
    saved,
    incoming,
    d_saved,
    partials,
    parts,
    sizes,
    blocks,
    span,
    first,
    GRAD_INPUTS: tl.constexpr,
    RELU: tl.constexpr,
    G: tl.constexpr,
    PARTS: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    LAST: tl.constexpr,
):
    """The gradients of the gates from the partial inner products, by every program anew, and dX of one part."""
    M: tl.constexpr = len(dxs)
    N: tl.constexpr = len(dys)
    N2: tl.constexpr = triton.next_power_of_2(N)
    sample = tl.program_id(0).to(tl.int64) + first
    products = partials + sample * parts * (M * N)
    store = tl.program_id(1) == 0
    d_projected = ()
    for i in tl.static_range(M):
        d_gates = sum_parts(products, parts, M * N, i * N, N2, PARTS)
        d_gates = tl.where(tl.arange(0, N2) < N, d_gates, 0.0)  # the padding of a row is the start of the next
        d_projected += (gate_row_bwd(d_gates, sample, i, gate[2], saved, incoming, d_saved, store, M, N, G),)
    if GRAD_INPUTS:
        g = load_scalars(saved[0] + sample * (M * N), M * N)
        c0, start, stop = corner_of(tl.program_id(1), blocks, span, sizes[1], BC)
        shares = shares_of(d_projected, gate[0], c0, sizes, G if G else N, BC)
        walk_grad_inputs(
            xs, x_strides, dys, dy_strides, dxs, g, shares, sample, c0, start, stop, sizes, BC, BS, LAST, RELU
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
    """One tile of out[i] = Σ_s left[s, i] right[s, i]ᵀ and, beside its first column, bias[i] = Σ_s left[s, i]."""
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
    """The gradients of all parameters (Eq. 3.14): a tile of W1 or, from number `tiles` on, of W2 for each program.

    A program adds all samples in their order. Atomics would add them in the order in which programs happen to end, and
    the last bits would differ from run to run; a library's matrix product may be set to round its factors to tf32.
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
