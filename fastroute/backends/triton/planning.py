"""How each kernel is launched, and which tier of kernels a problem takes.

Every number here is counted (bytes, registers, capacities), not measured: no card has run these kernels yet. Nothing
is tuned at the user's first step. The tiers of `cross_connect`, for N samples of m paths:

| tier | launches | X is read | taken when |
|---|---|---|---|
| resident | 1 | once | all paths of one sample fit the registers of one program |
| fused | 1 | again, from L2 | the samples in flight fit L2 together, and there are enough of them to fill the card |
| split | 3 for each chunk | again, from L2 | otherwise: many programs share a sample, and a chunk of samples fits L2 |

In the backward it is dY that is needed twice, and X once. The three launches of the split tier are one over the paths,
a small one for the gates, and one over the paths again.
"""

import math
from dataclasses import dataclass, replace

import triton

MIB = 2**20


@dataclass(frozen=True)
class Chip:
    """What the choice of a tier needs to know of a card."""

    sms: int
    l2_bytes: int
    chains: bool  # whether a launch may begin before the one before it has ended (compute capability 9.0 and newer)

    @property
    def reread_bytes(self) -> int:
        """What may wait in L2 for its second read: half of it. The rest is for what streams past in the meantime.

        A100 and H100 have their L2 in two partitions, so that what both sides read may be held twice.
        """
        return self.l2_bytes // 2


A100 = Chip(sms=108, l2_bytes=40 * MIB, chains=False)
H100 = Chip(sms=132, l2_bytes=50 * MIB, chains=True)
B200 = Chip(sms=148, l2_bytes=126 * MIB, chains=True)

INTERPRETED = replace(H100, chains=False)  # CPU tensors are planned for as if they lay on this card


@dataclass(frozen=True)
class Problem:
    """The sizes of one call.

    gate_channels is 0 for the linear gate, relu is whether one is taken of the paths, and flat is whether the kernels
    know the flat layout.
    """

    batch: int
    m: int
    n: int
    channels: int
    space: int
    gate_channels: int
    itemsize: int
    channels_last: bool
    backward: bool
    relu: bool = False
    flat: bool = True

    @property
    def size(self) -> int:
        """The elements of a path of one sample."""
        return self.channels * self.space

    @property
    def layout(self) -> str:
        """How tiles lie in memory: "last", "first", or "flat" where rows of positions would make accesses narrow."""
        if self.channels_last:
            return "last"
        narrow = math.gcd(self.space, MAX_UNIT) * self.itemsize < NARROW_BYTES
        fits = triton.next_power_of_2(self.space) * FLAT_CHANNELS <= FLAT_VALUES
        return "flat" if self.flat and narrow and fits else "first"

    @property
    def unit(self) -> int:
        """A factor of the contiguous extent that the compiler is told; in the flat layout all of it."""
        if self.layout == "flat":
            return self.space
        return math.gcd(self.channels if self.channels_last else self.space, MAX_UNIT)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(channels, space, channels · space), the unit divided out of the contiguous extent."""
        if self.channels_last:
            return self.channels // self.unit, self.space, self.size
        return self.channels, self.space // self.unit, self.size

    @property
    def twice(self) -> int:
        """How many paths are needed twice."""
        return self.n if self.backward else self.m

    @property
    def twice_bytes(self) -> int:
        """The bytes of one sample that are needed twice."""
        return self.twice * self.size * self.itemsize

    @property
    def gate_rows(self) -> int:
        """Rows, padded, of the matrices that multiply the pooled paths, those of all paths together."""
        return triton.next_power_of_2(self.m) * triton.next_power_of_2(self.gate_channels or self.n)


@dataclass(frozen=True)
class Resident:
    """One program holds a sample: block_c × block_s covers a path."""

    block_c: int
    block_s: int
    num_warps: int


@dataclass(frozen=True)
class Fused:
    """One program walks through a sample: in tiles where channels matter, in blocks where they do not."""

    block_c: int
    block_s: int
    block: int
    num_warps: int


@dataclass(frozen=True)
class Split:
    """`chunk` samples at a time: programs of `span` positions of block_c channels, and of `portion` elements."""

    block_c: int
    block_s: int
    span: int
    block: int
    portion: int
    chunk: int
    num_warps: int


@dataclass(frozen=True)
class Elementwise:
    """Programs of `portion` elements of a sample, in blocks."""

    block: int
    portion: int
    num_warps: int


# A multiprocessor has 65,536 registers of 4 bytes: 128 a thread for 512 threads, the most that one program is given.
REGISTER_FILE = 65536
MAX_WARPS = 16

# Beyond so many paths m + n, the addresses and the m·n gates, all in registers, leave too few for tiles: a program has
# half the warps, and its threads up to 255 registers. By the compiler's report 8 paths to 8 take 204 in the forward.
FEW_PATHS = 5

# Of 128 registers, what a resident sample may take. The other half is for addresses, sums and the gates. By the
# compiler's report, 64 are too many for four paths, which spill up to 104 bytes, and for three after a ReLU, up to 32.
RESIDENT_REGISTERS = 64
CROWDED_REGISTERS = 32

# Warps of a program that loops: two such programs may share a multiprocessor at 128 registers a thread.
LOOP_WARPS = 8

# What a thread loads of one tile: two loads of 16 bytes. 256 threads and two paths have 16 KiB in flight, so two
# programs exceed the 18 KB a multiprocessor that latency × bandwidth asks for on an H100 (0.7 µs × 3.35 TB/s / 132).
# A tile that is not one of many in a loop is twice as large, up to 16 sums in float32: more take over 80 registers.
MAX_BYTES, MAX_ELEMENTS = 32, 16

# Bytes of the tiles of all paths together, 32 registers: 32 up to 4 paths, 16 beyond.
TILE_BYTES = 128

# Registers for the m + n tiles and m·n accumulators of the inner products: 8 elements for 2 paths to 2, 4 for 3 to 3,
# 1 for 8 to 8.
PRODUCT_REGISTERS = 80
MAX_PRODUCT_ELEMENTS = 8

# Looping programs of 8 warps that share a multiprocessor, by what they do. With 2 paths to 2 the compiler gives those
# that hold sums beside all paths up to 128 registers a thread, which is room for 2, and the others up to 80, room for
# 3. Grids of the split tier are whole waves of so many programs.
PROGRAMS_PER_SM = {"fused": 2, "pool": 3, "mix": 3, "products": 2, "inputs": 3}

# The gate weights [C, m, K] are taken in tiles of at most this many values: 32 registers for each of 256 threads. A
# resident program, which has them beside its paths, has 512 threads for as many.
WEIGHT_VALUES = 8192

# The longest row of a tile. Along positions 256 keeps the waste small (6% of 56 × 56); along channels 64 half-precision
# values are one line of 128 bytes.
MAX_ROW_SPACE, MAX_ROW_CHANNELS = 256, 64

# The contiguous extent is told to the compiler as a multiple of its largest power of 2 up to this, rather than as a
# constant: all maps of odd multiples of 4 × 4 share one compiled kernel.
MAX_UNIT = 16

# Rows that are no multiple of 8 bytes, such as 7 × 7, would be loaded by single elements. Tiles of whole channels are
# loaded without regard to rows, and grouped by channel in shared memory: 64 accesses of 2 bytes become 8 of 16. From 8
# channels on, every tile begins at a multiple of 16 bytes. A tile of float32 takes at most 32 KiB of shared memory.
NARROW_BYTES, FLAT_CHANNELS, FLAT_VALUES = 8, 8, 8192

# Elements of a sample for one program where several share it: 32 KiB of each path in float32, much beside the few
# partial sums and gate weights that the program reads first.
PORTION = 8192

# What a program of the split tier does besides its steps, in steps: it begins, it loads gates, it adds up.
STEPS_BESIDE = 2

# How the split tier goes through a batch. "chunks": a chunk of samples is read a second time from L2, for three
# launches a chunk. "batch": all samples at once, for three launches, and the second read comes from memory. With 2
# paths to 2 that moves 1.5 times the bytes in the forward; where chunks are many, their launches may cost more.
SPLIT_BY = "chunks"

# One multiprocessor alone reads some 25 bytes a nanosecond, a share of 3.35 TB/s. A sample that keeps it busy for 5 µs,
# while most others idle, is better shared at the price of a second launch.
LONELY_BYTES = 128 * 2**10

# Partial sums are added in tiles of this many values, 8 a thread. Rows of few parts are taken many columns at a time,
# at most so many: a program has something to do, and its loads are wide.
PARTIAL_VALUES, PARTIAL_COLUMNS = 2048, 256

# Columns for each program where there are many parts: 64 of 8 paths to 8 are 16 programs, each with 512 rows in flight.
LONG_COLUMNS = 4

# The kernel of the gates has a few hundred values for each sample; more warps would wait for each other longer.
GATE_WARPS = 4

# Weight gradients: 128 samples side by side for 4 × 16 weights, 32 accumulators a thread. Small tiles, so that W1 of
# 16 × 64 is 16 programs for each path, and a batch of 128 is one step for each.
SAMPLES, ROWS, COLUMNS, WEIGHT_GRAD_WARPS = 128, 4, 16, 8

MAX_GRID_Y = 65535

# Scores that a program of the mixture-EM loss holds at once: 128 samples of 16 clusters go in one step, 8 to a thread.
# Up to five such tiles are alive.
MIXTURE_VALUES, MIXTURE_WARPS = 2048, 8


def plan(problem: Problem, chip: Chip) -> Resident | Fused | Split:
    """The tier and its settings."""
    if settings := resident(problem):
        return settings
    in_flight = min(problem.batch, PROGRAMS_PER_SM["fused"] * chip.sms)
    lonely = problem.batch < chip.sms // 2 and problem.twice_bytes > LONELY_BYTES
    if lonely or in_flight * problem.twice_bytes > chip.reread_bytes:
        return split(problem, chip)
    return fused(problem, chip)


def resident(problem: Problem) -> Resident | None:
    """Settings of the resident tier, or None where the sample does not fit."""
    block_c, block_s = triton.next_power_of_2(problem.channels), triton.next_power_of_2(problem.space)
    tiles = problem.twice + (1 if problem.backward else 0)  # X_i passes by
    registers = tiles * block_c * block_s * problem.itemsize // 4  # tiles are held in the dtype of the paths
    crowded = problem.m + problem.n <= FEW_PATHS and problem.twice + problem.relu > 3
    limit = CROWDED_REGISTERS if crowded else RESIDENT_REGISTERS
    if problem.layout == "flat" and block_c * block_s > FLAT_VALUES:
        return None
    if registers > 32 * most_warps(problem.m, problem.n) * limit or block_c * problem.gate_rows > WEIGHT_VALUES:
        return None
    elements = tiles * block_c * block_s
    # Half of the limit in elements for each thread, while there are warps, and 16 gate weights. In half precision that
    # is half of the registers: sums are in float32, and a program that is alone on its multiprocessor needs the warps.
    warps = max(elements // (32 * RESIDENT_REGISTERS // 2), block_c * problem.gate_rows // (32 * 16))
    return Resident(block_c, block_s, min(most_warps(problem.m, problem.n), _power_of_2_up_to(warps)))


def fused(problem: Problem, chip: Chip) -> Fused:
    """Settings of the fused tier."""
    # A program that has a multiprocessor to itself needs more warps to keep the memory busy.
    warps = LOOP_WARPS if problem.batch > chip.sms else most_warps(problem.m, problem.n)
    block_c, block_s = _tile(problem, 32 * warps * _elements(problem.twice, problem.itemsize))
    flat = elementwise(problem.m, problem.n, problem.size, problem.itemsize, problem.backward, warps)
    return Fused(block_c, block_s, flat.block, warps)


def split(problem: Problem, chip: Chip) -> Split:
    """Settings of the split tier."""
    settings = tiles(problem)
    walk, pass_over = ("inputs", "products") if problem.backward else ("pool", "mix")
    walk_slots, pass_slots = PROGRAMS_PER_SM[walk] * chip.sms, PROGRAMS_PER_SM[pass_over] * chip.sms
    # As many samples as L2 holds; more, where a wave of programs needs more. All chunks alike.
    blocks = triton.cdiv(problem.channels, settings.block_c) * (1 if problem.backward else problem.m)
    steps, flat_steps = _steps(problem, settings)
    programs = min(blocks * steps, flat_steps)
    samples = max(chip.reread_bytes // problem.twice_bytes, triton.cdiv(pass_slots, programs))
    if SPLIT_BY == "batch":
        samples = problem.batch
    chunk = triton.cdiv(problem.batch, triton.cdiv(problem.batch, samples))
    return replace(
        settings,
        chunk=chunk,
        span=settings.block_s * in_whole_waves(steps, chunk * blocks, walk_slots),
        portion=settings.block * in_whole_waves(flat_steps, chunk, pass_slots),
    )


def in_whole_waves(steps: int, beside: int, slots: int) -> int:
    """How many of the steps one program takes, where `beside` walks are shared out and `slots` programs run at once.

    The launch ends after the last wave, so that a wave of a few programs costs as much as a full one.
    """
    least = triton.cdiv(steps, MAX_GRID_Y)
    return min(
        range(least, min(steps, least + 255) + 1),
        key=lambda own: triton.cdiv(beside * triton.cdiv(steps, own), slots) * (own + STEPS_BESIDE),
    )


def tiles(problem: Problem) -> Split:
    """Settings of kernels of which many share a sample, all samples in one launch."""
    at_once = problem.twice if problem.backward else 1
    elements = _elements(at_once, problem.itemsize)
    if (
        triton.next_power_of_2(problem.space) <= MAX_ROW_SPACE and not problem.channels_last
    ):  # one step for each program
        elements = _power_of_2_up_to(min(MAX_ELEMENTS, 2 * MAX_BYTES // (at_once * problem.itemsize)))
    if problem.layout == "flat" and problem.backward:
        elements = min(elements, MAX_ELEMENTS // 2)  # beside them each has a share of its own, not one for its channel
    block_c, block_s = _tile(problem, 32 * LOOP_WARPS * max(1, elements))
    flat = elementwise(problem.m, problem.n, problem.size, problem.itemsize, problem.backward)
    spans = max(1, block_c * problem.space // PORTION)
    span = triton.cdiv(triton.cdiv(problem.space, block_s), spans) * block_s  # in the flat layout all positions
    return Split(block_c, block_s, span, flat.block, flat.portion, max(1, problem.batch), LOOP_WARPS)


def _steps(problem: Problem, settings: Split) -> tuple[int, int]:
    """Steps of a program that has all positions of its channels, and of one that has a sample."""
    return triton.cdiv(problem.space, settings.block_s), triton.cdiv(problem.size, settings.block)


def elementwise(m: int, n: int, size: int, itemsize: int, backward: bool, warps: int = LOOP_WARPS) -> Elementwise:
    """Settings of a kernel without channels: `mix`, its backward, and the inner products of the split tier."""
    elements = _product_elements(m, n) if backward else _elements(m, itemsize)
    block = min(triton.next_power_of_2(size), 32 * warps * elements)
    portion = max(PORTION, triton.next_power_of_2(triton.cdiv(size, MAX_GRID_Y)))
    return Elementwise(block, portion, min(warps, max(1, block // 32)))


def gate(problem: Problem, parts: int) -> dict[str, int]:
    """Settings of the small kernel that makes the gates of one sample, or their gradients, from so many parts."""
    # Half of the weights at a time: sums of products lie beside them, and beside those the parts.
    block_c = min(triton.next_power_of_2(problem.channels), max(1, WEIGHT_VALUES // (2 * problem.gate_rows)))
    products = triton.next_power_of_2(problem.m * problem.n)
    row = products if problem.backward else triton.next_power_of_2(problem.m) * block_c
    most = max(1, PARTIAL_VALUES // row)
    warps = _power_of_2_up_to(block_c * problem.gate_rows // (32 * 16))
    return {
        "PARTS": min(triton.next_power_of_2(max(1, parts)), most),
        "BC": block_c,
        "num_warps": min(LOOP_WARPS, max(GATE_WARPS, warps)),
        "maxnreg": max_registers(problem.m, problem.n),
    }


def partial_sums(parts: int, columns: int) -> dict[str, int]:
    """Settings of the kernel that adds up the parts of so many columns."""
    widest = min(triton.next_power_of_2(columns), PARTIAL_COLUMNS)
    tall = min(triton.next_power_of_2(parts), max(1, PARTIAL_VALUES // widest))
    if parts > tall:  # a long column: many rows in flight for a few columns
        widest, tall = min(widest, LONG_COLUMNS), max(1, PARTIAL_VALUES // min(widest, LONG_COLUMNS))
    return {"COLUMNS": widest, "PARTS": tall, "num_warps": min(LOOP_WARPS, max(1, widest * tall // 128))}


def mixture(samples: int, clusters: int) -> dict[str, int]:
    """Settings of the mixture-EM loss: samples and clusters of a tile, and warps."""
    columns = triton.next_power_of_2(clusters)
    rows = min(triton.next_power_of_2(samples), max(1, MIXTURE_VALUES // columns))
    return {"BN": rows, "BK": columns, "num_warps": min(MIXTURE_WARPS, max(1, rows * columns // 32))}


def most_warps(m: int, n: int) -> int:
    return MAX_WARPS if m + n <= FEW_PATHS else MAX_WARPS // 2


def max_registers(m: int, n: int) -> int:
    """The limit for the compiler. Without one, it spills a few bytes for the sake of occupancy."""
    return min(255, REGISTER_FILE // (32 * most_warps(m, n)))


def _power_of_2_up_to(value: int) -> int:
    return 1 << max(0, value.bit_length() - 1)


def _elements(tiles: int, itemsize: int) -> int:
    """What a thread loads of each of so many tiles at once."""
    return _power_of_2_up_to(min(MAX_BYTES, TILE_BYTES // tiles) // itemsize)


def _product_elements(m: int, n: int) -> int:
    """The same where there are sums of m·n products of tiles besides."""
    return min(MAX_PRODUCT_ELEMENTS, _power_of_2_up_to(PRODUCT_REGISTERS // (m + n + m * n)))


def _tile(problem: Problem, values: int) -> tuple[int, int]:
    """(block_c, block_s) of a tile of about so many values, long in the direction of the memory."""
    channels, space = triton.next_power_of_2(problem.channels), triton.next_power_of_2(problem.space)
    most_channels = min(channels, max(1, WEIGHT_VALUES // problem.gate_rows))
    if problem.layout == "flat":  # all positions
        return min(most_channels, max(FLAT_CHANNELS, min(values, FLAT_VALUES) // space)), space
    if problem.channels_last:
        block_c = min(most_channels, MAX_ROW_CHANNELS)
    else:
        block_c = min(most_channels, max(1, values // min(space, MAX_ROW_SPACE)))
    return block_c, min(space, values // block_c)
