"""Building blocks shared by the kernels.

All kernels treat a sample as two-dimensional, channels × positions, in either memory format. Offsets that grow with the
batch or the size of a sample are int64; offsets inside a tile are int32.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def batch_strides(paths: list[Tensor]) -> tuple[int, ...]:
    """Return the batch stride of each path; paths may have different ones."""
    return tuple(path.stride(0) for path in paths)


@triton.jit
def after_previous_launch(CHAINED: tl.constexpr):
    """Wait for the previous launch to end, and allow the next launch to begin (programmatic dependent launch).

    Code before this call overlaps with the previous launch. The next launch begins when all programs of this one have
    made this call; by then all earlier launches have ended.
    """
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def extents(sizes, UNIT: tl.constexpr, LAYOUT: tl.constexpr):
    """Return (channels, space, channels · space) from sizes, in which the contiguous extent is divided by UNIT.

    The constant factor UNIT lets the compiler vectorise accesses: rows of 14 × 14 begin at multiples of 4 elements.
    """
    channels, space, size = sizes
    if LAYOUT == "last":
        return channels * UNIT, space, size
    else:
        return channels, space * UNIT, size


@triton.jit
def tile_of(c0, s0, sizes, BC: tl.constexpr, BS: tl.constexpr, LAYOUT: tl.constexpr):
    """Return the tile from channel c0 and position s0: offset of its corner, offsets from the corner, mask.

    Offsets and mask are [C, S]. In the flat layout they are [C·S]: channel after channel without gaps, then padding, so
    that accesses are wide for every number of positions. A flat tile has all positions. See `as_matrix`.
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
def part_corner(part, blocks, span, space, BC: tl.constexpr):
    """Return the first channel, the first position and the end position of a part; parts go span by span."""
    start = (part // blocks) * span
    return (part % blocks) * BC, start, tl.minimum(start + span, space)


@triton.jit
def zero_tile(BC: tl.constexpr, BS: tl.constexpr, LAYOUT: tl.constexpr):
    return tl.zeros([BC * BS] if LAYOUT == "flat" else [BC, BS], tl.float32)


@triton.jit
def as_matrix(x, space, BC: tl.constexpr, BS: tl.constexpr, LAYOUT: tl.constexpr):
    """Return a tile as [C, S], with zeros beyond the positions."""
    if LAYOUT == "flat":
        c = tl.arange(0, BC)[:, None]
        s = tl.arange(0, BS)[None, :]
        at = tl.reshape(tl.where(s < space, c * space + s, 0), [BC * BS])
        return tl.where(s < space, tl.reshape(tl.gather(x, at, 0), [BC, BS]), 0.0)
    else:
        return x


@triton.jit
def broadcast_channels(values, space, BC: tl.constexpr, BS: tl.constexpr, LAYOUT: tl.constexpr):
    """Return one value per channel [C] in a shape that broadcasts over a tile."""
    if LAYOUT == "flat":
        at = tl.arange(0, BC * BS) // space
        return tl.gather(values, tl.minimum(at, BC - 1), 0)
    else:
        return values[:, None]


@triton.jit
def maybe_relu(x, RELU: tl.constexpr):
    """Return max(x, 0), which keeps NaN, or x without RELU."""
    if RELU:
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)  # one instruction for two halves, without a mask
    else:
        return x


@triton.jit
def load_tiles(paths, strides, sample, offsets, mask, EVICT: tl.constexpr, RELU: tl.constexpr = False):
    """Load the same tile of every path, in the paths' dtype: half precision takes half the registers."""
    tiles = ()
    for i in tl.static_range(len(paths)):
        x = tl.load(paths[i] + sample * strides[i] + offsets, mask=mask, other=0.0, eviction_policy=EVICT)
        tiles += (maybe_relu(x, RELU),)
    return tiles


@triton.jit
def stack(tiles):
    """Stack tiles along a new last dimension, padded with zeros to a power of 2, so that one reduction serves all."""
    SHAPE: tl.constexpr = tiles[0].shape
    COUNT: tl.constexpr = triton.next_power_of_2(len(tiles))
    for _ in tl.static_range(COUNT - len(tiles)):
        tiles += (tl.zeros(SHAPE, tiles[0].dtype),)
    for level in tl.static_range(1, 7):
        if COUNT >> level > 0:  # join tiles half a row apart, so that tile i stays at index i
            joined = ()
            for i in tl.static_range(COUNT >> level):
                joined += (tl.join(tiles[i], tiles[i + (COUNT >> level)]),)
            tiles = joined
    return tl.reshape(tiles[0], SHAPE + [COUNT])  # noqa: RUF005


@triton.jit
def sums_of(tiles, AXIS: tl.constexpr):
    """Return the sums of tiles over one axis, stacked as by `stack`."""
    if len(tiles) == 1:  # a new dimension before the sum would redistribute the tile among threads
        total = tl.sum(tiles[0], AXIS)
        return tl.expand_dims(total, len(tiles[0].shape) - 1)
    else:
        return tl.sum(stack(tiles), AXIS)


@triton.jit
def column(stacked, i: tl.constexpr):
    """Return column i of a matrix."""
    at = tl.arange(0, stacked.shape[1])[None, :]
    return tl.sum(tl.where(at == i, stacked, 0.0), 1)


@triton.jit
def weighted_sum(tiles, weights, first: tl.constexpr, step: tl.constexpr):
    """Return Σ_i weights[first + i·step] · tiles[i]."""
    total = weights[first] * tiles[0].to(tl.float32)
    for i in tl.static_range(1, len(tiles)):
        total += weights[first + i * step] * tiles[i].to(tl.float32)
    return total


@triton.jit
def zero_totals(COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Return accumulators for `add_products`."""
    totals = ()
    for _ in tl.static_range(COUNT):
        totals += (tl.zeros([BLOCK], tl.float32),)
    return totals


@triton.jit
def add_products(totals, xs, dys):
    """Return totals[i, j] + x_i · dy_j, elementwise, which avoids long chains of additions, as pairwise sums do."""
    new = ()
    for i in tl.static_range(len(xs)):
        for j in tl.static_range(len(dys)):
            new += (totals[i * len(dys) + j] + xs[i].to(tl.float32) * dys[j].to(tl.float32),)
    return new


@triton.jit
def sum_parts(values, parts, columns, first, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """Sum values (parts, columns) over the rows, in a fixed order, for COLUMNS columns from `first`."""
    column = first + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([PARTS, COLUMNS], tl.float32)
    for part0 in range(0, parts, PARTS):
        part = part0 + tl.arange(0, PARTS)[:, None]
        mask = (part < parts) & (column < columns)
        total += tl.load(values + part.to(tl.int64) * columns + column, mask=mask, other=0.0)  # [parts, columns]
    return tl.sum(total, 0)


@triton.jit
def to_scalars(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    """Return ROWS × COLUMNS of the values as scalars; rows are STRIDE apart."""
    at = tl.arange(0, values.shape[0])
    scalars = ()
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS):
            scalars += (tl.sum(tl.where(at == i * STRIDE + j, values, 0.0), 0),)
    return scalars


@triton.jit
def to_matrix(scalars, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr, STRIDE: tl.constexpr):
    """Return a padded matrix of scalars, from scalars[FIRST]: the inverse of `to_scalars`."""
    i = tl.arange(0, triton.next_power_of_2(ROWS))[:, None]
    j = tl.arange(0, triton.next_power_of_2(COLUMNS))[None, :]
    matrix = tl.zeros([triton.next_power_of_2(ROWS), triton.next_power_of_2(COLUMNS)], tl.float32)
    for row in tl.static_range(ROWS):
        for k in tl.static_range(COLUMNS):
            matrix = tl.where((i == row) & (j == k), scalars[FIRST + row * STRIDE + k], matrix)
    return matrix


@triton.jit
def load_scalars(values, COUNT: tl.constexpr):
    """Load COUNT adjacent values as scalars."""
    scalars = ()
    for k in tl.static_range(COUNT):
        scalars += (tl.load(values + k),)
    return scalars
