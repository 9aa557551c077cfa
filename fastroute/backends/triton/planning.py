"""Launch configurations of the kernels, and the choice between their tiers.

All numbers here are derived from bytes, registers and capacities; docs/gpu-path.md has the times on an H100. There is
no autotuning at run time. The tiers of `cross_connect`, for N samples of m paths:

| tier | launches | X is read | used when |
|---|---|---|---|
| resident | 1 | once | all paths of one sample fit in the registers of one program |
| fused | 1 | again, from L2 | the samples in flight fit in L2 together, and there are enough of them to fill the GPU |
| split | 3 per chunk | again, from L2 | otherwise: many programs share a sample, and a chunk of samples fits in L2 |

In the backward, dY is needed twice and X once. The three launches of the split tier are one over the paths, a small one
for the gates, and another one over the paths.
"""

import math
from dataclasses import dataclass, replace

import triton

MIB = 2**20


@dataclass(frozen=True)
class Chip:
    """Properties of a GPU that determine the tier."""

    sms: int
    l2_bytes: int
    chains: bool  # programmatic dependent launch (compute capability 9.0 and newer)

    @property
    def reread_budget(self) -> int:
        """Bytes that may stay in L2 for a second read: half of L2. The other half is for data streaming through.

        The L2 of A100 and H100 has two partitions, so that data read from both sides may be held twice.
        """
        return self.l2_bytes // 2


A100 = Chip(sms=108, l2_bytes=40 * MIB, chains=False)
H100 = Chip(sms=132, l2_bytes=50 * MIB, chains=True)
B200 = Chip(sms=148, l2_bytes=126 * MIB, chains=True)

INTERPRETED = replace(H100, chains=False)  # in the interpreter, CPU tensors are planned as on this GPU


@dataclass(frozen=True)
class Problem:
    """Sizes of one call.

    gate_channels is 0 for the linear gate; relu: whether the paths go through a ReLU; flat: whether the kernels support
    the flat layout.
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
        """Elements of one sample of a path."""
        return self.channels * self.space

    @property
    def layout(self) -> str:
        """Layout of tiles: "last", "first", or "flat" where accesses by rows of positions would be narrow."""
        if self.channels_last:
            return "last"
        narrow = math.gcd(self.space, MAX_UNIT) * self.itemsize < NARROW_BYTES
        fits = triton.next_power_of_2(self.space) * FLAT_CHANNELS <= FLAT_VALUES
        return "flat" if self.flat and narrow and fits else "first"

    @property
    def unit(self) -> int:
        """Constant factor of the contiguous extent, known to the compiler; in the flat layout the whole extent."""
        if self.layout == "flat":
            return self.space
        return math.gcd(self.channels if self.channels_last else self.space, MAX_UNIT)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(channels, space, channels · space), with the contiguous extent divided by the unit."""
        if self.channels_last:
            return self.channels // self.unit, self.space, self.size
        return self.channels, self.space // self.unit, self.size

    @property
    def reread_paths(self) -> int:
        """Number of paths that are needed twice."""
        return self.n if self.backward else self.m

    @property
    def reread_bytes(self) -> int:
        """Bytes of one sample that are needed twice."""
        return self.reread_paths * self.size * self.itemsize

    @property
    def gate_rows(self) -> int:
        """Padded number of rows of the matrices that multiply the pooled paths, over all paths."""
        return triton.next_power_of_2(self.m) * triton.next_power_of_2(self.gate_channels or self.n)


@dataclass(frozen=True)
class Resident:
    """One program holds a whole sample: block_c × block_s covers a path."""

    block_c: int
    block_s: int
    num_warps: int


@dataclass(frozen=True)
class Fused:
    """One program loops over a sample: in tiles where channels matter, in blocks where they do not."""

    block_c: int
    block_s: int
    block: int
    num_warps: int


@dataclass(frozen=True)
class Split:
    """Launches over `chunk` samples, with programs of `span` positions × block_c channels, or of `portion` elements."""

    block_c: int
    block_s: int
    span: int
    block: int
    portion: int
    chunk: int
    num_warps: int


Settings = Resident | Fused | Split


@dataclass(frozen=True)
class Elementwise:
    """Programs that process `portion` elements of a sample, in blocks."""

    block: int
    portion: int
    num_warps: int


# A multiprocessor has 65,536 registers of 4 bytes: 128 per thread for 512 threads, the most that one program gets.
REGISTER_FILE = 65536
MAX_WARPS = 16

# Above this number of paths m + n, addresses and m·n gates in registers leave too few for tiles: a program gets half
# the warps, and its threads up to 255 registers. By the compiler's report, 8 paths to 8 take 204 in the forward.
FEW_PATHS = 5

# Registers, of 128, for a resident sample. The other half is for addresses, sums and gates. By the compiler's report,
# 64 are too many for four paths, which spill up to 104 bytes, and for three after a ReLU, which spill up to 32.
RESIDENT_REGISTERS = 64
CROWDED_REGISTERS = 32

# Warps of a looping program: two such programs share a multiprocessor at 128 registers per thread.
LOOP_WARPS = 8

# Bytes of one tile per thread: two loads of 16 bytes. 256 threads and two paths have 16 KiB in flight, so two programs
# exceed the 18 KB per multiprocessor of latency × bandwidth on an H100 (0.7 µs × 3.35 TB/s / 132). A tile outside a
# loop is twice as large, up to 16 float32 sums: more would take over 80 registers.
MAX_BYTES, MAX_ELEMENTS = 32, 16

# Bytes of the tiles of all paths per thread, 32 registers: 32 each up to 4 paths, 16 above.
TILE_BYTES = 128

# Registers for the m + n tiles and m·n accumulators of the inner products: 8 elements for 2 paths to 2, 4 for 3 to 3,
# 1 for 8 to 8.
PRODUCT_REGISTERS = 80
MAX_PRODUCT_ELEMENTS = 8

# Looping programs of 8 warps per multiprocessor (occupancy), by kernel. For 2 paths to 2 the compiler uses up to 128
# registers per thread in kernels that hold sums besides all paths, which allows 2 programs, and up to 80 in the others,
# which allows 3. Grids of the split tier are whole waves of that many programs.
PROGRAMS_PER_SM = {"fused": 2, "pool": 3, "mix": 3, "products": 2, "inputs": 3}

# Maximal values of a tile of gate weights [C, m, K]: 32 registers for each of 256 threads. A resident program, which
# holds them besides its paths, has 512 threads for the same number.
WEIGHT_VALUES = 8192

# Maximal row of a tile. Along positions, 256 keeps the padding small (6% of 56 × 56); along channels, 64 half-precision
# values are one cache line of 128 bytes.
MAX_ROW_SPACE, MAX_ROW_CHANNELS = 256, 64

# The compiler knows the contiguous extent as a multiple of its largest power of 2 up to this, not as a constant, so
# that all maps of odd multiples of 4 × 4 share one compiled kernel.
MAX_UNIT = 16

# Rows that are not a multiple of 8 bytes, such as 7 × 7, would be loaded by single elements. The flat layout loads
# tiles of whole channels and regroups them by channel in shared memory: 64 accesses of 2 bytes become 8 of 16. With 8
# channels or more, every tile begins at a multiple of 16 bytes. A float32 tile takes at most 32 KiB of shared memory.
NARROW_BYTES, FLAT_CHANNELS, FLAT_VALUES = 8, 8, 8192

# Elements per program where several programs share a sample: 32 KiB of each path in float32, far more than the partial
# sums and gate weights that the program reads first.
PORTION = 8192

# Overhead of a program of the split tier, in steps: start, loading gates, final sums.
OVERHEAD_STEPS = 2

# Order of the split tier. "chunks": three launches per chunk of samples, whose second read comes from L2. "batch":
# three launches for all samples, whose second read comes from memory. For 2 paths to 2 "batch" moves 1.5 times the
# bytes in the forward; with many chunks, their launches may cost more.
SPLIT_BY = "chunks"

# One multiprocessor reads about 25 bytes per nanosecond, its share of 3.35 TB/s. If most multiprocessors are idle, a
# sample that takes one of them 5 µs is better shared, at the price of a second launch.
IDLE_SPLIT_BYTES = 128 * 2**10

# Values of a tile of partial sums, 8 per thread. With few parts, a program takes many columns, up to this maximum, so
# that it has enough work and wide loads.
PARTIAL_VALUES, PARTIAL_COLUMNS = 2048, 256

# Columns per program with many parts: the 64 of 8 paths to 8 are 16 programs, each with 512 rows in flight.
LONG_COLUMNS = 4

# The gate kernel has a few hundred values per sample; more warps would wait longer for each other.
GATE_WARPS = 4

# Weight gradients: 128 samples × 4 × 16 weights, 32 accumulators per thread. With such small tiles, W1 of 16 × 64 gives
# 16 programs per path, and a batch of 128 is one step.
SAMPLES, ROWS, COLUMNS, WEIGHT_GRAD_WARPS = 128, 4, 16, 8

MAX_GRID_Y, MAX_OFFSET = 65535, 2**31 - 1

# Scores per step of the mixture-EM loss: 128 samples of 16 clusters, 8 per thread. Up to five such tiles are live.
MIXTURE_VALUES, MIXTURE_WARPS = 2048, 8


def plan(problem: Problem, chip: Chip) -> Settings:
    """Return the settings of the tier for a problem."""
    if settings := resident(problem):
        return settings
    in_flight = min(problem.batch, PROGRAMS_PER_SM["fused"] * chip.sms)
    mostly_idle = problem.batch < chip.sms // 2 and problem.reread_bytes > IDLE_SPLIT_BYTES
    if mostly_idle or in_flight * problem.reread_bytes > chip.reread_budget:
        return split(problem, chip)
    return fused(problem, chip)


def resident(problem: Problem) -> Resident | None:
    """Return the settings of the resident tier, or None if a sample does not fit."""
    block_c, block_s = triton.next_power_of_2(problem.channels), triton.next_power_of_2(problem.space)
    tiles = problem.reread_paths + (1 if problem.backward else 0)  # X_i is streamed
    registers = tiles * block_c * block_s * problem.itemsize // 4  # tiles are held in the dtype of the paths
    crowded = problem.m + problem.n <= FEW_PATHS and problem.reread_paths + problem.relu > 3
    limit = CROWDED_REGISTERS if crowded else RESIDENT_REGISTERS
    if problem.layout == "flat" and block_c * block_s > FLAT_VALUES:
        return None
    if registers > 32 * max_warps(problem.m, problem.n) * limit or block_c * problem.gate_rows > WEIGHT_VALUES:
        return None
    elements = tiles * block_c * block_s
    # Elements per thread: half of the register limit, and 16 gate weights, up to the maximal number of warps. In half
    # precision these take half the registers: sums are in float32, and a program alone on its multiprocessor needs
    # warps.
    warps = max(elements // (32 * RESIDENT_REGISTERS // 2), block_c * problem.gate_rows // (32 * 16))
    return Resident(block_c, block_s, min(max_warps(problem.m, problem.n), _previous_power_of_2(warps)))


def fused(problem: Problem, chip: Chip) -> Fused:
    """Return the settings of the fused tier."""
    # A program alone on its multiprocessor needs more warps to saturate memory.
    warps = LOOP_WARPS if problem.batch > chip.sms else max_warps(problem.m, problem.n)
    block_c, block_s = _tile(problem, 32 * warps * _elements(problem.reread_paths, problem.itemsize))
    flat = elementwise(problem.m, problem.n, problem.size, problem.itemsize, problem.backward, warps)
    return Fused(block_c, block_s, flat.block, warps)


def split(problem: Problem, chip: Chip) -> Split:
    """Return the settings of the split tier."""
    settings = tiles(problem)
    walk, pass_over = ("inputs", "products") if problem.backward else ("pool", "mix")
    walk_slots, pass_slots = PROGRAMS_PER_SM[walk] * chip.sms, PROGRAMS_PER_SM[pass_over] * chip.sms
    # As many samples as fit in L2, but at least one wave of programs. All chunks are of equal size.
    channel_blocks = triton.cdiv(problem.channels, settings.block_c)
    blocks = channel_blocks * (1 if problem.backward else problem.m)
    steps, flat_steps = _steps(problem, settings)
    programs = min(blocks * steps, flat_steps)
    samples = max(chip.reread_budget // problem.reread_bytes, triton.cdiv(pass_slots, programs))
    if SPLIT_BY == "batch":
        samples = problem.batch
    chunk = triton.cdiv(problem.batch, triton.cdiv(problem.batch, samples))
    return replace(
        settings,
        chunk=chunk,
        span=settings.block_s * steps_per_program(steps, chunk * blocks, walk_slots, channel_blocks),
        portion=settings.block * steps_per_program(flat_steps, chunk, pass_slots),
    )


def steps_per_program(steps: int, loops: int, slots: int, beside: int = 1) -> int:
    """Return the number of steps per program that minimises the time of a launch in whole waves.

    A launch ends with its last wave, so that a wave of a few programs costs as much as a full one.

    Args:
        steps: steps of each loop that is divided among programs.
        loops: number of such loops.
        slots: programs that run at once.
        beside: loops that share the grid's second axis.
    """
    least = triton.cdiv(steps, max(1, MAX_GRID_Y // beside))
    return min(
        range(least, min(steps, least + 255) + 1),
        key=lambda own: triton.cdiv(loops * triton.cdiv(steps, own), slots) * (own + OVERHEAD_STEPS),
    )


def tiles(problem: Problem) -> Split:
    """Return the settings of kernels in which many programs share a sample, for all samples in one launch."""
    at_once = problem.reread_paths if problem.backward else 1
    elements = _elements(at_once, problem.itemsize)
    if triton.next_power_of_2(problem.space) <= MAX_ROW_SPACE and not problem.channels_last:  # one step per program
        elements = _previous_power_of_2(min(MAX_ELEMENTS, 2 * MAX_BYTES // (at_once * problem.itemsize)))
    if problem.layout == "flat" and problem.backward:
        elements = min(elements, MAX_ELEMENTS // 2)  # each element needs its own share, not one per channel
    block_c, block_s = _tile(problem, 32 * LOOP_WARPS * max(1, elements))
    flat = elementwise(problem.m, problem.n, problem.size, problem.itemsize, problem.backward)
    blocks = triton.cdiv(problem.channels, block_c)  # which share the grid's second axis with the spans
    spans = max(1, min(block_c * problem.space // PORTION, MAX_GRID_Y // blocks))
    span = triton.cdiv(triton.cdiv(problem.space, block_s), spans) * block_s  # all positions in the flat layout
    return Split(block_c, block_s, span, flat.block, flat.portion, max(1, problem.batch), LOOP_WARPS)


def _steps(problem: Problem, settings: Split) -> tuple[int, int]:
    """Return the steps of a program over all positions of its channels, and of one over a whole sample."""
    return triton.cdiv(problem.space, settings.block_s), triton.cdiv(problem.size, settings.block)


def elementwise(m: int, n: int, size: int, itemsize: int, backward: bool, warps: int = LOOP_WARPS) -> Elementwise:
    """Return the settings of elementwise kernels: `mix`, its backward, and the inner products of the split tier."""
    elements = _product_elements(m, n) if backward else _elements(m, itemsize)
    block = min(triton.next_power_of_2(size), 32 * warps * elements)
    portion = max(PORTION, triton.next_power_of_2(triton.cdiv(size, MAX_GRID_Y)))
    return Elementwise(block, portion, min(warps, max(1, block // 32)))


def gate(problem: Problem, parts: int) -> dict[str, int]:
    """Return the settings of the small kernel that computes a sample's gates, or their gradients, from partial sums."""
    # Half of the weights at a time, since registers also hold sums of products and the parts.
    block_c = min(triton.next_power_of_2(problem.channels), max(1, WEIGHT_VALUES // (2 * problem.gate_rows)))
    products = triton.next_power_of_2(problem.m * problem.n)
    row = products if problem.backward else triton.next_power_of_2(problem.m) * block_c
    most = max(1, PARTIAL_VALUES // row)
    warps = _previous_power_of_2(block_c * problem.gate_rows // (32 * 16))
    return {
        "PARTS": min(triton.next_power_of_2(max(1, parts)), most),
        "BC": block_c,
        "num_warps": min(LOOP_WARPS, max(GATE_WARPS, warps)),
        "maxnreg": max_registers(problem.m, problem.n),
    }


def partial_sums(parts: int, columns: int) -> dict[str, int]:
    """Return the settings of the kernel that adds up partial sums."""
    widest = min(triton.next_power_of_2(columns), PARTIAL_COLUMNS)
    tall = min(triton.next_power_of_2(parts), max(1, PARTIAL_VALUES // widest))
    if parts > tall:  # long columns: many rows in flight for a few columns
        widest, tall = min(widest, LONG_COLUMNS), max(1, PARTIAL_VALUES // min(widest, LONG_COLUMNS))
    return {"COLUMNS": widest, "PARTS": tall, "num_warps": min(LOOP_WARPS, max(1, widest * tall // 128))}


def mixture(samples: int, clusters: int) -> dict[str, int]:
    """Return the settings of the mixture-EM loss: samples and clusters of a tile, and warps."""
    columns = triton.next_power_of_2(clusters)
    rows = min(triton.next_power_of_2(samples), max(1, MIXTURE_VALUES // columns))
    return {"BN": rows, "BK": columns, "num_warps": min(MIXTURE_WARPS, max(1, rows * columns // 32))}


def max_warps(m: int, n: int) -> int:
    return MAX_WARPS if m + n <= FEW_PATHS else MAX_WARPS // 2


def max_registers(m: int, n: int) -> int:
    """Return the register limit for the compiler, which without one spills a few bytes to raise occupancy."""
    return min(255, REGISTER_FILE // (32 * max_warps(m, n)))


def _previous_power_of_2(value: int) -> int:
    return 1 << max(0, value.bit_length() - 1)


def _elements(tiles: int, itemsize: int) -> int:
    """Return the elements per thread of each of `tiles` tiles."""
    return _previous_power_of_2(min(MAX_BYTES, TILE_BYTES // tiles) // itemsize)


def _product_elements(m: int, n: int) -> int:
    """Return the same for kernels that also accumulate m·n products of tiles."""
    return min(MAX_PRODUCT_ELEMENTS, _previous_power_of_2(PRODUCT_REGISTERS // (m + n + m * n)))


def _fewest_channels(channels: int) -> int:
    """Return the channels of a block with which all blocks fit the grid's second axis, whatever registers they take."""
    return triton.next_power_of_2(triton.cdiv(channels, MAX_GRID_Y))


def _tile(problem: Problem, values: int) -> tuple[int, int]:
    """Return (block_c, block_s) of a tile of about `values` values, long in the contiguous direction."""
    channels, space = triton.next_power_of_2(problem.channels), triton.next_power_of_2(problem.space)
    most_channels = min(channels, max(1, WEIGHT_VALUES // problem.gate_rows))
    if problem.layout == "flat":  # all positions
        block_c = min(most_channels, max(FLAT_CHANNELS, min(values, FLAT_VALUES) // space))
        return max(block_c, _fewest_channels(problem.channels)), space
    if problem.channels_last:
        block_c = min(most_channels, MAX_ROW_CHANNELS)
    else:
        block_c = min(most_channels, max(1, values // min(space, MAX_ROW_SPACE)))
        # Offsets inside a tile are int32.
        block_c = min(block_c, _previous_power_of_2(MAX_OFFSET // (problem.space + MAX_ROW_SPACE)))
    block_c = max(block_c, _fewest_channels(problem.channels))
    return block_c, min(space, max(1, values // block_c))
