"""The pieces that the kernels share.

A sample is two-dimensional to them all: channels by positions, whichever lie next to each other in memory. Offsets that
grow with the batch or with the size of a sample are int64; offsets inside a tile are int32.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def batch_strides(paths: list[Tensor]) -> tuple[int, ...]:
    """The distance between the samples of each path, which is free to differ."""
    return tuple(path.stride(0) for path in paths)


@triton.jit
def after_previous_launch(CHAINED: tl.constexpr):
    """Wait for the launch before, where this one may begin early, and let the next one begin early.

    What a program does before this is done while the programs of the launch before still run. The next launch begins
    when all programs of this one are past this, so that all launches but the last have ended by then.
    """
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def extents(sizes, UNIT: tl.constexpr, LAYOUT: tl.constexpr):
    """(channels, space, channels · space) from sizes, where UNIT is divided out of the extent that is contiguous.

    A factor that the compiler knows is what makes accesses wide: rows of 14 × 14 begin at multiples of 4 elements.
    """
    channels, space, size = sizes
    if LAYOUT == "last":
        return channels * UNIT, space, size
    else:
        return channels, space * UNIT, size


@triton.jit
def tile_of(c0, s0, sizes, BC: tl.constexpr, BS: tl.constexpr, LAYOUT: tl.constexpr):
    """The tile from channel c0 and position s0 on: offset of its corner, offsets from there, mask.

    Offsets and mask are [C, S]. In the flat layout they are [C·S], channel after channel without gaps and then padding,
    so that accesses are wide whatever the number of positions; such a tile has all of them. See `regrouped`.
    """
    channels, space, size = sizes
    if LAYOUT == "flat":
        corner = tl.cast(c0, tl.int64) * space
        at = tl.arange(0, BC * BS)
        return corner, at, (at < BC * space) & (at < size - corner)
    else:
        c = tl.arange(0, BC)[:, None]
        s = tl.arange(0, BS)[None, :]
        mask = (c0 + c < channels) & (s0 + s < space)
        if LAYOUT == "last":
            return tl.cast(s0, tl.int64) * channels + c0, s * channels + c, mask
        else:
            return tl.cast(c0, tl.int64) * space + s0, c * space + s, mask


@triton.jit
def zero_tile(BC: tl.constexpr, BS: tl.constexpr, LAYOUT: tl.constexpr):
    return tl.zeros([BC * BS] if LAYOUT == "flat" else [BC, BS], tl.float32)


@triton.jit
def regrouped(x, space, BC: tl.constexpr, BS: tl.constexpr, LAYOUT: tl.constexpr):
    """A tile as [C, S], zero beyond the positions."""
    if LAYOUT == "flat":
        c = tl.arange(0, BC)[:, None]
        s = tl.arange(0, BS)[None, :]
        at = tl.reshape(tl.where(s < space, c * space + s, 0), [BC * BS])
        return tl.where(s < space, tl.reshape(tl.gather(x, at, 0), [BC, BS]), 0.0)
    else:
        return x


@triton.jit
def spread(values, space, BC: tl.constexpr, BS: tl.constexpr, LAYOUT: tl.constexpr):
    """One value for each channel [C] in the shape that broadcasts over a tile."""
    if LAYOUT == "flat":
        at = tl.arange(0, BC * BS) // space
        return tl.gather(values, tl.minimum(at, BC - 1), 0)
    else:
        return values[:, None]


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
def stack(tiles):
    """Tiles side by side in a new last dimension, with zeros up to a power of 2: one reduction then serves them all."""
    SHAPE: tl.constexpr = tiles[0].shape
    COUNT: tl.constexpr = triton.next_power_of_2(len(tiles))
    for _ in tl.static_range(COUNT - len(tiles)):
        tiles += (tl.zeros(SHAPE, tiles[0].dtype),)
    for level in tl.static_range(1, 7):
        if COUNT >> level > 0:  # the tiles half a row apart become neighbours: tile i of the outcome is tile i
            joined = ()
            for i in tl.static_range(COUNT >> level):
                joined += (tl.join(tiles[i], tiles[i + (COUNT >> level)]),)
            tiles = joined
    return tl.reshape(tiles[0], SHAPE + [COUNT])  # noqa: RUF005


@triton.jit
def sums_of(tiles, AXIS: tl.constexpr):
    """The sums of tiles over one axis, side by side as by `stack`."""
    if len(tiles) == 1:  # a new dimension before the sum would move the whole tile to other threads
        total = tl.sum(tiles[0], AXIS)
        return tl.expand_dims(total, len(tiles[0].shape) - 1)
    else:
        return tl.sum(stack(tiles), AXIS)


@triton.jit
def column(stacked, i: tl.constexpr):
    """Column i of a matrix."""
    at = tl.arange(0, stacked.shape[1])[None, :]
    return tl.sum(tl.where(at == i, stacked, 0.0), 1)


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
def entries(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """ROWS × COLUMNS of the values, whose rows are STRIDE apart, as scalars."""
    at = tl.arange(0, values.shape[0])
    scalars = ()
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS):
            scalars += (tl.sum(tl.where(at == i * STRIDE + j, values, 0.0), 0),)
    return scalars


@triton.jit
def matrix_of(scalars, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr, STRIDE: tl.constexpr):
    """The reverse: a padded matrix of the scalars from the FIRST on, which every thread has at hand."""
    i = tl.arange(0, triton.next_power_of_2(ROWS))[:, None]
    j = tl.arange(0, triton.next_power_of_2(COLUMNS))[None, :]
    matrix = tl.zeros([triton.next_power_of_2(ROWS), triton.next_power_of_2(COLUMNS)], tl.float32)
    for row in tl.static_range(ROWS):
        for k in tl.static_range(COLUMNS):
            matrix = tl.where((i == row) & (j == k), scalars[FIRST + row * STRIDE + k], matrix)
    return matrix


@triton.jit
def load_scalars(values, COUNT: tl.constexpr):
    """COUNT values that lie next to each other."""
    scalars = ()
    for k in tl.static_range(COUNT):
        scalars += (tl.load(values + k),)
    return scalars
