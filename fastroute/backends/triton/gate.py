"""The gates of a router on their own (Eq. 3.3 to 3.5), by the kernels of cross-connection's split tier."""

import torch
import triton
import triton.language as tl

from fastroute.backends.triton import cross_connect as cc
from fastroute.backends.triton import launch_tables as tables
from fastroute.backends.triton._cross_connect_kernels import (
    cross_connect_inputs_bwd_kernel,
    cross_connect_mix_fwd_kernel,
    weight_tile,
)
from fastroute.backends.triton._recording import launch
from fastroute.backends.triton._tiles import batch_strides


@triton.jit
def gate_shares_kernel(d_projected, w, shares, channels, space, K: tl.constexpr, BC: tl.constexpr):
    """What each position of a path gets through the pooling (Eq. 3.15), from the gradient (N, m, K) of w·Z."""
    i, m = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(0).to(tl.int64) * m + i
    k = tl.arange(0, triton.next_power_of_2(K))
    d = tl.load(d_projected + row * K + k, mask=k < K, other=0.0)
    c0 = tl.program_id(2) * BC
    c = c0 + tl.arange(0, BC)
    dz = tl.sum(weight_tile(w, i, c0, channels, K, BC) * d[:, None], 0)
    tl.store(shares + row * channels + c, tl.div_rn(dz, tl.cast(space, tl.float32)), mask=c < channels)


def gate(xs, w1, b1, w2, b2):
    x, m, n = xs[0], len(xs), w2.shape[1]
    problem = cc.problem_of(x, m, n, w1, backward=False)
    rows = (n, n, problem.channels, problem.gate_channels)
    saved = tuple(x.new_empty((problem.batch, m, row), dtype=torch.float32) for row in rows)  # gates, scores, Z, H
    if problem.batch == 0:
        return saved
    settings = tables.tiles(problem)
    paths, parameters = (tuple(xs), batch_strides(xs)), cc.gate_of(w1, b1, w2, b2)
    with torch.cuda.device_of(x):
        pooling = cc.Pooling(problem, settings, x, saved[2])
        pooling.launch(paths, parameters[0], 0, problem.batch, relu=False)
        launch(cross_connect_mix_fwd_kernel, (problem.batch, 1))(  # with nothing to mix
            *paths,
            (x,) * n,
            parameters,
            saved,
            pooling.partials,
            pooling.parts,
            0,
            0,
            0,
            RELU=False,
            G=problem.gate_channels,
            PARTS=max(1, tables.PARTIAL_VALUES // problem.gate_block),
            BLOCK=settings.block,
            **cc.program_of(problem, settings),
        )
        pooling.finish()
    return saved


def gate_backward(grad_gates, grad_scores, xs, w1, b1, w2, b2, gates, pooled, hidden):
    x, m, n = xs[0], len(xs), w2.shape[1]
    problem = cc.problem_of(x, m, n, w1, backward=True)
    grads = cc.empty_gradients(gates, w1, w2)
    shares = torch.empty_like(pooled)
    if problem.batch == 0:
        return shares, *(grad.zero_() for grad in grads)
    settings = tables.tiles(problem)
    parameters = cc.gate_of(w1, b1, w2, b2)
    incoming = tuple(None if grad is None else grad.contiguous() for grad in (grad_gates, grad_scores))
    d_saved = (torch.empty_like(gates), torch.empty_like(hidden))  # dA, dH
    w, k = parameters[0], parameters[0].shape[1]
    block_c = min(triton.next_power_of_2(problem.channels), max(1, tables.WEIGHT_VALUES // problem.gate_block))
    with torch.cuda.device_of(x):
        launch(cross_connect_inputs_bwd_kernel, (problem.batch, 1))(  # without inner products: of the incoming alone
            tuple(xs),
            (0,) * m,
            (x,) * n,
            (0,) * n,
            tuple(xs),
            parameters,
            (gates, hidden),
            incoming,
            d_saved,
            gates,
            0,
            (problem.channels, problem.space, problem.channels * problem.space),
            1,
            settings.span,
            0,
            GRAD_INPUTS=False,
            RELU=False,
            G=problem.gate_channels,
            PARTS=tables.PARTIAL_VALUES // triton.next_power_of_2(n),
            **cc.tile_of_problem(problem, settings),
        )
        launch(gate_shares_kernel, (problem.batch, m, triton.cdiv(problem.channels, block_c)))(
            d_saved[0] if w1 is None else d_saved[1],
            w,
            shares,
            problem.channels,
            problem.space,
            K=k,
            BC=block_c,
            num_warps=tables.LOOP_WARPS,
        )
        cc.launch_weights(d_saved, pooled, hidden, grads, problem)
    return shares, *grads
