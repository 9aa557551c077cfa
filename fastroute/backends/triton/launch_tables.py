"""How each kernel is launched, and which tier of kernels a problem takes.

Every number here is counted (bytes, registers, capacities), not measured: no card has run these kernels yet. Nothing
is tuned at the user's first step. The tiers of `cross_connect`, for N samples of m paths:

| tier | launches | X is read | taken when |
|---|---|---|---|
| resident | 1 | once | all paths of one sample fit the registers of one program |
| fused | 1 | again, from L2 | the samples in flight fit L2 together, and there are enough of them to fill the card |
| split | 2 for each chunk | again, from L2 | otherwise: many programs share a sample, and a chunk of samples fits L2 |

In the backward it is dY that is needed twice, and X once.
"""

from dataclasses import dataclass, replace

import triton

MIB = 2**20


@dataclass(frozen=True)
class Chip:
    """What the choice of a tier needs to know of a card."""

    sms: int
    l2_bytes: int

    @property
    def reread_bytes(self) -> int:
        """What may wait in L2 for its second read: half of it. The rest is for what streams past in the meantime.

        A100 and H100 have their L2 in two partitions, so that what both sides read may be held twice.
        """
        return self.l2_bytes // 2


A100 = Chip(sms=108, l2_bytes=40 * MIB)
H100 = Chip(sms=132, l2_bytes=50 * MIB)
B200 = Chip(sms=148, l2_bytes=126 * MIB)

INTERPRETED = H100  # CPU tensors are planned for as if they lay on this card


@dataclass(frozen=True)
class Problem:
    """The sizes of one call; gate_channels is 0 for the linear gate, and relu is whether one is taken of the paths."""

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

    @property
    def twice(self) -> int:
        """How many paths are needed twice."""
        return self.n if self.backward else self.m

    @property
    def twice_bytes(self) -> int:
        """The bytes of one sample that are needed twice."""
        return self.twice * self.channels * self.space * self.itemsize

    @property
    def gate_block(self) -> int:
        """Rows, padded, of the matrix that multiplies the pooled paths."""
        return triton.next_power_of_2(self.gate_channels or self.n)


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
FEW_PATHS = 6

# Of 128 registers, what a resident sample may take. The other half is for addresses, sums and the gates. By the
# compiler's report, 64 are too many for four paths, which spill up to 104 bytes, and for three after a ReLU, up to 32.
RESIDENT_REGISTERS = 64
CROWDED_REGISTERS = 32

# Warps of a program that loops: two such programs may share a multiprocessor at 128 registers a thread.
LOOP_WARPS = 8

# What a thread loads of one tile: two loads of 16 bytes in float32, one in half precision. 256 threads and two paths
# have 16 KiB in flight, so two programs exceed the 18 KB a multiprocessor that latency × bandwidth asks for on an H100
# (0.7 µs × 3.35 TB/s / 132).
MAX_ELEMENTS = 8

# Registers for the tiles of all paths together: 8 elements up to 4 paths, 4 beyond.
TILE_REGISTERS = 32

# Registers for the m + n tiles and m·n accumulators of the inner products: 8 elements for 2 paths to 2, 4 for 3 to 3,
# 1 for 8 to 8.
PRODUCT_REGISTERS = 80

# Looping programs that share a multiprocessor, at 64 registers a thread: what is in flight, for the count of L2.
PROGRAMS_PER_SM = 4

# A matrix of gate weights [K, C] is taken in tiles of at most this many values: 32 registers for each of 256 threads.
WEIGHT_VALUES = 8192

# The longest row of a tile. Along positions 256 keeps the waste small (6% of 56 × 56); along channels 64 half-precision
# values are one line of 128 bytes.
MAX_ROW_SPACE, MAX_ROW_CHANNELS = 256, 64

# Elements of a sample for one program where several share it: 32 KiB of each path in float32, much beside the few
# partial sums and gate weights that the program reads first.
PORTION = 8192

# Values that one program pools in the split tier: 8 channels of 56 × 56 in NCHW. In channels_last it has more channels
# and fewer positions, and the sums over several programs cost a small launch at the end.
SLAB = 32768

# One multiprocessor alone reads some 25 bytes a nanosecond, a share of 3.35 TB/s. A sample that keeps it busy for 5 µs,
# while most others idle, is better shared at the price of a second launch.
LONELY_BYTES = 128 * 2**10

# Partial sums are added in tiles of this many values, 8 a thread.
PARTIAL_VALUES = 2048

# Columns for each program where partial sums are all there is to do: 64 of 8 paths to 8 are 16 programs, each with 512
# rows in flight.
PARTIAL_COLUMNS = 4

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
    in_flight = min(problem.batch, PROGRAMS_PER_SM * chip.sms)
    lonely = problem.batch < chip.sms // 2 and problem.twice_bytes > LONELY_BYTES
    if lonely or in_flight * problem.twice_bytes > chip.reread_bytes:
        return split(problem, chip)
    return fused(problem, chip)


def resident(problem: Problem) -> Resident | None:
    """Settings of the resident tier, or None where the sample does not fit."""
    block_c, block_s = triton.next_power_of_2(problem.channels), triton.next_power_of_2(problem.space)
    tiles = problem.twice + (1 if problem.backward else 0)  # X_i passes by
    registers = tiles * block_c * block_s
    crowded = problem.m + problem.n <= FEW_PATHS and problem.twice + problem.relu > 3
    limit = CROWDED_REGISTERS if crowded else RESIDENT_REGISTERS
    if registers > 32 * most_warps(problem.m, problem.n) * limit or block_c * problem.gate_block > WEIGHT_VALUES:
        return None
    warps = _power_of_2_up_to(registers // (32 * RESIDENT_REGISTERS // 2))  # half of the limit, while there are warps
    return Resident(block_c, block_s, min(most_warps(problem.m, problem.n), warps))


def fused(problem: Problem, chip: Chip) -> Fused:
    """Settings of the fused tier."""
    # A program that has a multiprocessor to itself needs more warps to keep the memory busy.
    warps = LOOP_WARPS if problem.batch > chip.sms else most_warps(problem.m, problem.n)
    block_c, block_s = _tile(problem, 32 * warps * _elements(problem.twice if problem.backward else 1))
    size = triton.next_power_of_2(problem.channels * problem.space)
    elements = _product_elements(problem.m, problem.n) if problem.backward else _elements(problem.m)
    return Fused(block_c, block_s, min(size, 32 * warps * elements), warps)


def split(problem: Problem, chip: Chip) -> Split:
    """Settings of the split tier."""
    settings = tiles(problem)
    # As many samples as L2 holds; more, where two programs for each multiprocessor need more. All chunks alike.
    portions = triton.cdiv(problem.channels * problem.space, settings.portion)
    parts = triton.cdiv(problem.channels, settings.block_c) * triton.cdiv(problem.space, settings.span)
    programs = min(portions, parts if problem.backward else parts * problem.m)
    samples = max(chip.reread_bytes // problem.twice_bytes, triton.cdiv(2 * chip.sms, programs))
    return replace(settings, chunk=triton.cdiv(problem.batch, triton.cdiv(problem.batch, samples)))


def tiles(problem: Problem) -> Split:
    """Settings of kernels of which many share a sample, all samples in one launch."""
    block_c, block_s = _tile(problem, 32 * LOOP_WARPS * _elements(problem.twice if problem.backward else 1))
    spans = max(1, block_c * problem.space // (PORTION if problem.backward else SLAB))
    span = triton.cdiv(triton.cdiv(problem.space, block_s), spans) * block_s
    flat = elementwise(problem.m, problem.n, problem.channels * problem.space, problem.backward)
    return Split(block_c, block_s, span, flat.block, flat.portion, max(1, problem.batch), LOOP_WARPS)


def elementwise(m: int, n: int, size: int, backward: bool) -> Elementwise:
    """Settings of a kernel without channels: `mix`, its backward, and the inner products of the split tier."""
    elements = _product_elements(m, n) if backward else _elements(m)
    block = min(triton.next_power_of_2(size), 32 * LOOP_WARPS * elements)
    portion = max(PORTION, triton.next_power_of_2(triton.cdiv(size, MAX_GRID_Y)))
    return Elementwise(block, portion, min(LOOP_WARPS, max(1, block // 32)))


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


def _elements(tiles: int) -> int:
    """What a thread loads of each of so many tiles at once."""
    return min(MAX_ELEMENTS, _power_of_2_up_to(TILE_REGISTERS // tiles))


def _product_elements(m: int, n: int) -> int:
    """The same where there are sums of m·n products of tiles besides."""
    return min(MAX_ELEMENTS, _power_of_2_up_to(PRODUCT_REGISTERS // (m + n + m * n)))


def _tile(problem: Problem, values: int) -> tuple[int, int]:
    """(block_c, block_s) of a tile of about so many values, long in the direction of the memory."""
    channels, space = triton.next_power_of_2(problem.channels), triton.next_power_of_2(problem.space)
    most_channels = min(channels, max(1, WEIGHT_VALUES // problem.gate_block))
    if problem.channels_last:
        block_c = min(most_channels, MAX_ROW_CHANNELS)
    else:
        block_c = min(most_channels, max(1, values // min(space, MAX_ROW_SPACE)))
    return block_c, min(space, values // block_c)
