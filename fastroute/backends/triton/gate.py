"""The gates of a router without routing (Eq. 3.3 to 3.5), by the kernels of cross-connection's split tier."""

import torch

from fastroute.backends.triton import cross_connect as cc
from fastroute.backends.triton import planning
from fastroute.backends.triton._tiles import batch_strides


def gate(xs, w1, b1, w2, b2):
    x, m, n = xs[0], len(xs), w2.shape[1]
    problem = cc.problem_of(x, m, n, w1, backward=False)
    rows = (n, n, problem.channels, problem.gate_channels)
    saved = tuple(x.new_empty((problem.batch, m, row), dtype=torch.float32) for row in rows)  # gates, scores, Z, H
    if problem.batch == 0:
        return saved
    paths, parameters = (tuple(xs), batch_strides(xs)), cc.gate_of(w1, b1, w2, b2)
    with torch.cuda.device_of(x):
        gating = cc.Gating(problem, planning.tiles(problem), cc._chip(x.device), saved)
        gating.launch(paths, parameters, 0, problem.batch)
    return saved


def gate_backward(grad_gates, grad_scores, xs, w1, b1, w2, b2, gates, pooled, hidden):
    x, m, n = xs[0], len(xs), w2.shape[1]
    problem = cc.problem_of(x, m, n, w1, backward=True)
    grads = cc.empty_gradients(gates, w1, w2)
    shares = torch.empty_like(pooled)
    if problem.batch == 0:
        return shares, *(grad.zero_() for grad in grads)
    parameters = cc.gate_of(w1, b1, w2, b2)
    incoming = tuple(None if grad is None else grad.contiguous() for grad in (grad_gates, grad_scores))
    d_saved = (torch.empty_like(gates), torch.empty_like(hidden))  # dA, dH
    with torch.cuda.device_of(x):
        saved, unchained = (gates, hidden), {"CHAINED": False}
        cc.launch_gate_bwd(  # with 0 parts: no inner products, only the incoming gradients
            problem, gates, parameters, saved, incoming, d_saved, shares, 0, 0, problem.batch, unchained
        )
        cc.launch_weights(d_saved, pooled, hidden, grads, problem)
    return shares, *grads
