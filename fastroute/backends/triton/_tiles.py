"""The pieces that the kernels share.

A sample is two-dimensional to them all: channels by positions, whichever lie next to each other in memory. Offsets that
grow with the batch or with the size of a sample are int64; offsets inside a tile are int32.
"""

import triton
import triton.language as tl
from torch import Tensor


def batch_strides(paths: list[Tensor]) -> tuple[int, ...]:
    """The distance between the samples of each path, which is free to differ."""
    return tuple(path.stride(0) for path in paths)


@triton.jit
def tile_of(c0, s0, channels, space, BC: tl.constexpr, BS: tl.constexpr, LAST: tl.constexpr):
    """The tile from channel c0 and position s0 on: offset of its corner, offsets [C, S] from there, mask [C, S]."""
    c = tl.arange(0, BC)[:, None]
    s = tl.arange(0, BS)[None, :]
    mask = (c0 + c < channels) & (s0 + s < space)
    if LAST:
        return tl.cast(s0, tl.int64) * channels + c0, s * channels + c, mask
    else:
        return tl.cast(c0, tl.int64) * space + s0, c * space + s, mask


@triton.jit
def rectified(x, RELU: tl.constexpr):
    """max(x, 0), NaN staying NaN, or x without RELU."""
    if RELU:
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # one instruction for two halves, without a mask
    else:
        return x


@triton.jit
def load_tiles(paths, strides, sample, offsets, mask, EVICT: tl.constexpr, RELU: tl.constexpr = False):
    """The same tile of every path, in the paths' dtype: what is held in half precision takes half the registers."""
    tiles = ()
    for i in tl.static_range(len(paths)):
        x = tl.load(paths[i] + sample * strides[i] + offsets, mask=mask, other=0.0, eviction_policy=EVICT)
        tiles += (rectified(x, RELU),)
    return tiles


@triton.jit
def weighted_sum(tiles, weights, first: tl.constexpr, step: tl.constexpr):
    """Σ_i weights[first + i·step] · tiles[i]."""
    total = weights[first] * tiles[0].to(tl.float32)
    for i in tl.static_range(1, len(tiles)):
        total += weights[first + i * step] * tiles[i].to(tl.float32)
    return total


@triton.jit
def zero_totals(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Accumulators for `add_products`."""
    totals = ()
    for _ in tl.static_range(COUNT):
        totals += (tl.zeros([BLOCK], tl.float32),)
    return totals


@triton.jit
def add_products(totals, xs, dys):
    """totals[i, j] + x_i · dy_j, element by element: as in pairwise sums, no long chain of additions arises."""
    new = ()
    for i in tl.static_range(len(xs)):
        for j in tl.static_range(len(dys)):
            new += (totals[i * len(dys) + j] + xs[i].to(tl.float32) * dys[j].to(tl.float32),)
    return new


@triton.jit
def sum_parts(values, parts, columns, first, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Σ over the rows of values (parts, columns), always in one order, for COLUMNS columns from the first on."""
    column = first + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for part0 in range(0, parts, PARTS):
        part = part0 + tl.arange(0, PARTS)[:, None]
        mask = (part < parts) & (column < columns)
        total += tl.load(values + part.to(tl.int64) * columns + column, mask=mask, other=0.0)  # [parts, columns]
    return tl.sum(total, 0)


@triton.jit
def entries(row, N: tl.constexpr):
    """The N values of a padded row, as scalars."""
    j = tl.arange(0, triton.next_power_of_2(N))
    values = ()
    for k in tl.static_range(N):
        values += (tl.sum(tl.where(j == k, row, 0.0), 0),)
    return values


@triton.jit
def load_scalars(values, COUNT: tl.constexpr):
    """COUNT values that lie next to each other."""
    scalars = ()
    for k in tl.static_range(COUNT):
        scalars += (tl.load(values + k),)
    return scalars
