"""Gates inside of kernels (Eq. 3.3 to 3.5) and their backward, of one sample.

`gate` is (weights, b1, w2, b2), where the weights (m, K, C) multiply the pooled paths: W1, or W2 for the linear gate,
where G is 0. `saved` is (gates, scores, pooled, hidden) in the forward, and (gates, hidden) in the backward.

Tile dimensions m, n, K and G are padded to a power of 2. The gates of all paths are one tile, so that each step is one
reduction.
"""

import triton
import triton.language as tl

from fastroute.backends.triton._tiles import load_scalars, to_matrix, to_scalars


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
