"""Launches of cross-connection routing (Alg. 2) and its backward."""

import functools
import math

import torch
import triton

from fastroute.backends.triton import planning
from fastroute.backends.triton._cross_connect_backward import (
    cross_connect_fused_bwd_kernel,
    cross_connect_gate_bwd_kernel,
    cross_connect_inputs_bwd_kernel,
    cross_connect_resident_bwd_kernel,
    cross_connect_weights_bwd_kernel,
)
from fastroute.backends.triton._cross_connect_forward import (
    cross_connect_fused_fwd_kernel,
    cross_connect_gate_fwd_kernel,
    cross_connect_pool_fwd_kernel,
    cross_connect_resident_fwd_kernel,
)
from fastroute.backends.triton._recording import launch
from fastroute.backends.triton._tiles import batch_strides
from fastroute.backends.triton.mix import mix_bwd_kernel, mix_fwd_kernel
from fastroute.ops._paths import channels_first, empty_path


@functools.cache
def _chip(device: torch.device) -> planning.Chip:
    if device.type == "cpu":
        return planning.INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return planning.Chip(properties.multi_processor_count, properties.L2_cache_size, chains=properties.major >= 9)


@functools.lru_cache(maxsize=4096)
def _plan(problem: planning.Problem, chip: planning.Chip) -> planning.Settings:
    return planning.plan(problem, chip)


def is_channels_last(x: torch.Tensor) -> bool:
    """Return whether the channels are contiguous; with a single position they are in any format."""
    return math.prod(x.shape[2:]) == 1 or not channels_first(x)


def problem_of(
    x: torch.Tensor, m: int, n: int, w1: torch.Tensor | None, backward: bool, relu: bool = False
) -> planning.Problem:
    return planning.Problem(
        batch=x.shape[0],
        m=m,
        n=n,
        channels=x.shape[1],
        space=math.prod(x.shape[2:]),
        gate_channels=0 if w1 is None else w1.shape[1],
        itemsize=x.itemsize,
        channels_last=is_channels_last(x),
        backward=backward,
        relu=relu,
    )


def gate_of(w1, b1, w2, b2) -> tuple[torch.Tensor | None, ...]:
    """Return the kernels' argument `gate`, with all parameters in float32."""
    w1, b1, w2, b2 = (None if p is None else p.float().contiguous() for p in (w1, b1, w2, b2))
    return w2 if w1 is None else w1, b1, w2, b2


def program_of(problem: planning.Problem, settings: planning.Settings) -> dict[str, int]:
    """Return the launch options for warps and registers."""
    return {"num_warps": settings.num_warps, "maxnreg": planning.max_registers(problem.m, problem.n)}


def tile_of_problem(problem: planning.Problem, settings: planning.Settings) -> dict[str, int]:
    """Return the tile and launch options of a kernel that loops over [C, S]."""
    tile = {"BC": settings.block_c, "BS": settings.block_s, "UNIT": problem.unit, "LAYOUT": problem.layout}
    return tile | program_of(problem, settings)


def chained(chip: planning.Chip, begins: bool = False) -> dict[str, bool]:
    """Return the options of a launch in a chain of dependent launches; the first of a chain does not begin early."""
    if not chip.chains:
        return {"CHAINED": False}
    return {"CHAINED": True, "launch_pdl": not begins}


class Gating:
    """First two launches of the split tier, for chunks of samples: partial sums for Z, then the gates."""

    def __init__(self, problem: planning.Problem, settings: planning.Split, chip: planning.Chip, saved: tuple):
        self.problem, self.settings, self.chip, self.saved = problem, settings, chip, saved
        self.blocks = triton.cdiv(problem.channels, settings.block_c)
        self.spans = triton.cdiv(problem.space, settings.span)
        _, _, pooled, _ = saved
        self.sums = pooled
        if self.spans > 1:
            self.sums = pooled.new_empty((problem.batch, problem.m, self.spans, problem.channels))

    def launch(self, paths: tuple, gate: tuple, first: int, chunk: int) -> None:
        problem = self.problem
        launch(cross_connect_pool_fwd_kernel, (chunk, self.blocks * self.spans, problem.m))(
            *paths,
            self.sums,
            problem.sizes,
            self.blocks,
            self.settings.span,
            first,
            RELU=problem.relu,
            **tile_of_problem(problem, self.settings),
            **chained(self.chip, begins=first == 0),
        )
        launch(cross_connect_gate_fwd_kernel, (chunk,))(
            self.sums,
            gate,
            self.saved,
            self.spans,
            problem.channels,
            first,
            M=problem.m,
            N=problem.n,
            G=problem.gate_channels,
            **planning.gate(problem, self.spans),
            **chained(self.chip),
        )


def launch_gate_bwd(
    problem: planning.Problem,
    partials: torch.Tensor,
    gate: tuple,
    saved: tuple,
    incoming: tuple,
    d_saved: tuple,
    shares: torch.Tensor | None,
    parts: int,
    first: int,
    chunk: int,
    chain: dict[str, bool],
) -> None:
    """Launch the computation of dA, dH and shares of a chunk of samples."""
    launch(cross_connect_gate_bwd_kernel, (chunk,))(
        partials,
        gate,
        saved,
        incoming,
        d_saved,
        shares,
        parts,
        problem.channels,
        problem.space,
        first,
        M=problem.m,
        N=problem.n,
        G=problem.gate_channels,
        **planning.gate(problem, parts),
        **chain,
    )


def empty_gradients(gates: torch.Tensor, w1: torch.Tensor | None, w2: torch.Tensor) -> tuple[torch.Tensor, ...]:
    shapes = ((0,), (0,)) if w1 is None else (w1.shape, w1.shape[:2])
    return tuple(gates.new_empty(shape) for shape in (*shapes, w2.shape, w2.shape[:2]))


def launch_weights(d_saved: tuple, pooled: torch.Tensor, hidden: torch.Tensor, grads: tuple, problem: planning.Problem):
    """Launch the computation of all parameters' gradients, from dA and dH."""
    tiles = [
        triton.cdiv(rows, planning.ROWS) * triton.cdiv(columns, planning.COLUMNS)
        for rows, columns in (grads[0].shape[1:] or (0, 0), grads[2].shape[1:])
    ]
    launch(cross_connect_weights_bwd_kernel, (sum(tiles), problem.m))(
        d_saved,
        pooled,
        hidden,
        grads,
        tiles[0],
        problem.batch,
        problem.m,
        problem.n,
        problem.channels,
        G=problem.gate_channels,
        SAMPLES=planning.SAMPLES,
        ROWS=planning.ROWS,
        COLUMNS=planning.COLUMNS,
        num_warps=planning.WEIGHT_GRAD_WARPS,
    )


def cross_connect(xs, w1, b1, w2, b2, relu):
    x, m, n = xs[0], len(xs), w2.shape[1]
    problem = problem_of(x, m, n, w1, backward=False, relu=relu)
    batch, channels, size = problem.batch, problem.channels, problem.size
    chip = _chip(x.device)
    outputs = [empty_path(x) for _ in range(n)]
    rows = (n, n, channels, problem.gate_channels)  # of gates, scores, Z and H
    saved = gates, _, _, _ = tuple(x.new_empty((batch, m, row), dtype=torch.float32) for row in rows)
    if batch == 0:
        return outputs, *saved
    settings = _plan(problem, chip)
    program, tile = program_of(problem, settings), tile_of_problem(problem, settings)
    sizes, options = problem.sizes, {"RELU": relu, "G": problem.gate_channels}
    paths, ys, gate = (tuple(xs), batch_strides(xs)), tuple(outputs), gate_of(w1, b1, w2, b2)
    with torch.cuda.device_of(x):
        if isinstance(settings, planning.Resident):
            launch(cross_connect_resident_fwd_kernel, (batch,))(*paths, ys, gate, saved, sizes, **options, **tile)
        elif isinstance(settings, planning.Fused):
            launch(cross_connect_fused_fwd_kernel, (batch,))(
                *paths, ys, gate, saved, sizes, BLOCK=settings.block, **options, **tile
            )
        else:
            gating = Gating(problem, settings, chip, saved)
            for first in range(0, batch, settings.chunk):
                chunk = min(settings.chunk, batch - first)
                gating.launch(paths, gate, first, chunk)
                launch(mix_fwd_kernel, (chunk, triton.cdiv(size, settings.portion)))(
                    *paths,
                    ys,
                    gates,
                    first,
                    size,
                    settings.portion,
                    STATIC=False,
                    BLOCK=settings.block,
                    RELU=relu,
                    **program,
                    **chained(chip),
                )
    return outputs, *saved


def cross_connect_backward(
    grad_outputs, grad_gates, grad_scores, xs, w1, b1, w2, b2, gates, pooled, hidden, relu, grad_inputs
):
    x, m, n = xs[0], len(xs), len(grad_outputs)
    problem = problem_of(x, m, n, w1, backward=True, relu=relu)
    batch, channels, size = problem.batch, problem.channels, problem.size
    chip = _chip(x.device)
    grad_xs = [empty_path(x) for _ in xs] if grad_inputs else []
    grads = empty_gradients(gates, w1, w2)
    if batch == 0:
        return grad_xs, *(grad.zero_() for grad in grads)
    settings = _plan(problem, chip)
    program, tile = program_of(problem, settings), tile_of_problem(problem, settings)
    sizes = problem.sizes
    options = {"GRAD_INPUTS": grad_inputs, "RELU": relu, "G": problem.gate_channels}
    paths, dys = (tuple(xs), batch_strides(xs)), (tuple(grad_outputs), batch_strides(grad_outputs))
    dxs = tuple(grad_xs if grad_inputs else xs)  # not written without GRAD_INPUTS
    incoming = tuple(None if grad is None else grad.contiguous() for grad in (grad_gates, grad_scores))
    d_saved = (torch.empty_like(gates), torch.empty_like(hidden))  # dA, dH
    common = (gate_of(w1, b1, w2, b2), (gates, hidden), incoming, d_saved)
    with torch.cuda.device_of(x):
        if isinstance(settings, planning.Resident):
            launch(cross_connect_resident_bwd_kernel, (batch,))(*paths, *dys, dxs, *common, sizes, **options, **tile)
        elif isinstance(settings, planning.Fused):
            launch(cross_connect_fused_bwd_kernel, (batch,))(
                *paths, *dys, dxs, *common, sizes, BLOCK=settings.block, **options, **tile
            )
        else:
            parts = triton.cdiv(size, settings.portion)
            blocks, spans = triton.cdiv(channels, settings.block_c), triton.cdiv(problem.space, settings.span)
            partials = gates.new_empty((batch, parts, m, n))
            shares = torch.empty_like(pooled) if grad_inputs else None
            for first in range(0, batch, settings.chunk):
                chunk = min(settings.chunk, batch - first)
                launch(mix_bwd_kernel, (chunk, parts))(
                    *paths,
                    *dys,
                    dxs,
                    gates,
                    partials,
                    first,
                    size,
                    settings.portion,
                    STATIC=False,
                    GRAD_INPUTS=False,
                    BLOCK=settings.block,
                    EVICT_DY="",
                    RELU=relu,
                    **program,
                    **chained(chip, begins=first == 0),
                )
                launch_gate_bwd(problem, partials, *common, shares, parts, first, chunk, chained(chip))
                if grad_inputs:
                    launch(cross_connect_inputs_bwd_kernel, (chunk, blocks * spans))(
                        *paths,
                        *dys,
                        dxs,
                        gates,
                        shares,
                        sizes,
                        blocks,
                        settings.span,
                        first,
                        RELU=relu,
                        **tile,
                        **chained(chip),
                    )
        launch_weights(d_saved, pooled, hidden, grads, problem)
    return grad_xs, *grads
