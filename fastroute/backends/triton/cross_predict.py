"""Cross-prediction (Alg. 1): elementwise kernels around PyTorch's convolutions."""

import math
import sys

import torch
import triton
import triton.language as tl

from fastroute.backends._cross_predict import Passes
from fastroute.backends.triton import planning
from fastroute.backends.triton._recording import launch
from fastroute.backends.triton._tiles import batch_strides, extents, load_scalars, part_corner, tile_of, zero_totals
from fastroute.backends.triton.cross_connect import is_channels_last
from fastroute.backends.triton.mix import launch_sum_parts
from fastroute.ops._paths import channels_first


@triton.jit
def joined_tile(c0, s0, part, sizes, PARTS: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr, LAYOUT: tl.constexpr):
    """Return corner and offsets as `tile_of`, for one of PARTS paths concatenated along the channels of a tensor."""
    channels, space, size = sizes
    c = tl.arange(0, BC)[:, None]
    s = tl.arange(0, BS)[None, :]
    if LAYOUT == "last":
        return tl.cast(s0, tl.int64) * (channels * PARTS) + part * channels + c0, s * (channels * PARTS) + c
    else:
        return tl.cast(part, tl.int64) * size + tl.cast(c0, tl.int64) * space + s0, c * space + s


@triton.jit
def sum_predictions_kernel(
    us,
    u_strides,
    ys,
    y_strides,
    gates,
    offsets,
    sizes,
    blocks,
    span,
    RELU: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    M: tl.constexpr = len(us)
    N: tl.constexpr = len(ys)
    sizes = extents(sizes, UNIT, LAYOUT)
    channels, space, _ = sizes
    sample = tl.program_id(0).to(tl.int64)
    g = load_scalars(gates + sample * (M * N), M * N)
    c0, start, stop = part_corner(tl.program_id(1), blocks, span, space, BC)
    c = c0 + tl.arange(0, BC)
    for j in tl.static_range(N):
        if offsets is None:
            offset = tl.zeros([BC], tl.float32)
        else:
            offset = tl.load(offsets + (sample * N + j) * channels + c, mask=c < channels, other=0.0)
        for s0 in range(start, stop, BS):
            corner, at, mask = tile_of(c0, s0, sizes, BC, BS, LAYOUT)
            from_corner, from_at = joined_tile(c0, s0, j, sizes, N, BC, BS, LAYOUT)
            total = tl.zeros([BC, BS], tl.float32) + offset[:, None]
            for i in tl.static_range(M):
                u = tl.load(us[i] + sample * u_strides[i] + from_corner + from_at, mask=mask, other=0.0)  # [C, S]
                total += g[i * N + j] * u.to(tl.float32)
            if RELU:
                total = tl.where(total < 0, 0.0, total)  # a maximum with 0 would hide a NaN
            tl.store(ys[j] + sample * y_strides[j] + corner + at, total, mask=mask)  # Eq. 3.6


@triton.jit
def scale_paths_kernel(
    xs,
    x_strides,
    masks,
    mask_strides,
    weights,
    masked,
    masked_strides,
    scaled,
    scaled_strides,
    totals,
    sizes,
    blocks,
    span,
    SUMS: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Mask and scale paths; with SUMS, write each program's part of the sums over space to totals (N, spans, P, C)."""
    P: tl.constexpr = len(xs)
    Q: tl.constexpr = len(scaled)
    sizes = extents(sizes, UNIT, LAYOUT)
    channels, space, _ = sizes
    sample = tl.program_id(0).to(tl.int64)
    w = load_scalars(weights + sample * (P * Q), P * Q)
    c0, start, stop = part_corner(tl.program_id(1), blocks, span, space, BC)
    for p in tl.static_range(P):
        total = tl.zeros([BC, BS], tl.float32)
        for s0 in range(start, stop, BS):
            corner, at, mask = tile_of(c0, s0, sizes, BC, BS, LAYOUT)
            x = tl.load(xs[p] + sample * x_strides[p] + corner + at, mask=mask, other=0.0).to(tl.float32)  # [C, S]
            if len(masks) > 0:
                y = tl.load(masks[p] + sample * mask_strides[p] + corner + at, mask=mask, other=0.0).to(tl.float32)
                x = tl.where(y <= 0, 0.0, x)
            if len(masked) > 0:
                tl.store(masked[p] + sample * masked_strides[p] + corner + at, x, mask=mask)
            if SUMS:
                total += x
            to_corner, to_at = joined_tile(c0, s0, p, sizes, P, BC, BS, LAYOUT)
            for q in tl.static_range(Q):
                tl.store(scaled[q] + sample * scaled_strides[q] + to_corner + to_at, w[p * Q + q] * x, mask=mask)
        if SUMS:
            c = c0 + tl.arange(0, BC)
            row = (sample * (tl.num_programs(1) // blocks) + tl.program_id(1) // blocks) * P + p
            tl.store(totals + row * channels + c, tl.sum(total, 1), mask=c < channels)


@triton.jit
def sum_gradients_kernel(
    terms,
    term_strides,
    xs,
    x_strides,
    dxs,
    dx_strides,
    gates,
    partials,
    sizes,
    blocks,
    span,
    BC: tl.constexpr,
    BS: tl.constexpr,
    UNIT: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Write <T_ij, X_i> of one part of a sample to partials (N, parts, m, n), and its dX unless dxs is empty."""
    M: tl.constexpr = len(xs)
    N: tl.constexpr = len(terms)
    sizes = extents(sizes, UNIT, LAYOUT)
    _, space, _ = sizes
    sample = tl.program_id(0).to(tl.int64)
    g = load_scalars(gates + sample * (M * N), M * N)
    c0, start, stop = part_corner(tl.program_id(1), blocks, span, space, BC)
    row = (sample * tl.num_programs(1) + tl.program_id(1)) * (M * N)
    for i in tl.static_range(M):
        totals = zero_totals(N, BC * BS)
        for s0 in range(start, stop, BS):
            corner, at, mask = tile_of(c0, s0, sizes, BC, BS, LAYOUT)
            from_corner, from_at = joined_tile(c0, s0, i, sizes, M, BC, BS, LAYOUT)
            x = tl.load(xs[i] + sample * x_strides[i] + corner + at, mask=mask, other=0.0).to(tl.float32)  # [C, S]
            dx = tl.zeros([BC, BS], tl.float32)
            new = ()
            for j in tl.static_range(N):
                t = tl.load(terms[j] + sample * term_strides[j] + from_corner + from_at, mask=mask, other=0.0)
                dx += g[i * N + j] * t.to(tl.float32)
                new += (totals[j] + tl.reshape(x * t.to(tl.float32), [BC * BS]),)
            totals = new
            if len(dxs) > 0:
                tl.store(dxs[i] + sample * dx_strides[i] + corner + at, dx, mask=mask)
        for j in tl.static_range(N):
            tl.store(partials + row + i * N + j, tl.sum(totals[j], 0))


def _launch(x: torch.Tensor, joined: list[torch.Tensor], m: int, n: int) -> tuple[tuple[int, int], tuple, dict]:
    """Return grid, (sizes, blocks, span) and tile of a pass over paths like x, of which it holds m or n at once.

    Where x has one channel it has both memory formats, and the joined tensors, with more channels, tell which.
    """
    problem = planning.Problem(
        batch=x.shape[0],
        m=m,
        n=n,
        channels=x.shape[1],
        space=math.prod(x.shape[2:]),
        gate_channels=0,
        itemsize=x.itemsize,
        channels_last=is_channels_last(x) or not all(map(channels_first, joined)),
        backward=True,  # n tiles of one path after another, m of them
        flat=False,
    )
    settings = planning.tiles(problem)
    blocks, spans = triton.cdiv(problem.channels, settings.block_c), triton.cdiv(problem.space, settings.span)
    tile = {
        "BC": settings.block_c,
        "BS": settings.block_s,
        "UNIT": problem.unit,
        "LAYOUT": problem.layout,
        "num_warps": settings.num_warps,
        "maxnreg": planning.max_registers(m, n),
    }
    return (problem.batch, blocks * spans), (problem.sizes, blocks, settings.span), tile


def sum_predictions(predictions, gates, offsets, relu, outputs):
    y, m, n = outputs[0], len(predictions), len(outputs)
    grid, sizes, tile = _launch(y, predictions, m, n)
    if grid[0]:
        with torch.cuda.device_of(y):
            launch(sum_predictions_kernel, grid)(
                tuple(predictions),
                batch_strides(predictions),
                tuple(outputs),
                batch_strides(outputs),
                gates.contiguous(),
                None if offsets is None else offsets.contiguous(),
                *sizes,
                RELU=relu,
                **tile,
            )


def scale_paths(paths, masks, weights, sums, masked, scaled):
    x, parts = paths[0], len(paths)
    grid, sizes, tile = _launch(x, scaled, parts, max(1, len(scaled)))
    blocks = sizes[1]
    spans = grid[1] // blocks
    shape = (x.shape[0] if sums else 0, parts, x.shape[1])
    totals = weights.new_empty(shape)
    if grid[0] == 0:
        return totals
    partials = totals if spans == 1 or not sums else weights.new_empty((grid[0], spans, *shape[1:]))
    with torch.cuda.device_of(x):
        launch(scale_paths_kernel, grid)(
            tuple(paths),
            batch_strides(paths),
            tuple(masks),
            batch_strides(masks),
            weights.contiguous(),
            tuple(masked),
            batch_strides(masked),
            tuple(scaled),
            batch_strides(scaled),
            partials,
            *sizes,
            SUMS=sums,
            **tile,
        )
        if partials is not totals:
            launch_sum_parts(partials, totals, grid[0], spans, parts * x.shape[1])
    return totals


def sum_gradients(terms, xs, gates, grad_xs):
    x, m, n = xs[0], len(xs), len(terms)
    grid, sizes, tile = _launch(x, terms, m, n)
    products = torch.empty_like(gates, memory_format=torch.contiguous_format)
    if grid[0] == 0:
        return products
    partials = products if grid[1] == 1 else gates.new_empty((*grid, m, n))
    with torch.cuda.device_of(x):
        launch(sum_gradients_kernel, grid)(
            tuple(terms),
            batch_strides(terms),
            tuple(xs),
            batch_strides(xs),
            tuple(grad_xs),
            batch_strides(grad_xs),
            gates.contiguous(),
            partials,
            *sizes,
            **tile,
        )
        if partials is not products:
            launch_sum_parts(partials, products, grid[0], grid[1], m * n)
    return products


# A GPU needs large launches; the predictions of such a chunk take 256 MiB for two paths to two.
PASSES = Passes(sys.modules[__name__], chunk_bytes=64 << 20)
cross_predict, cross_predict_backward = PASSES.forward, PASSES.backward
