"""Cross-connection routing (Alg. 2) and its backward: which kernels run, and what they are given."""

import functools
import math

import torch
import triton

from fastroute.backends.triton import launch_tables as tables
from fastroute.backends.triton._cross_connect_kernels import (
    cross_connect_fused_bwd_kernel,
    cross_connect_fused_fwd_kernel,
    cross_connect_inputs_bwd_kernel,
    cross_connect_mix_fwd_kernel,
    cross_connect_pool_fwd_kernel,
    cross_connect_resident_bwd_kernel,
    cross_connect_resident_fwd_kernel,
    cross_connect_weights_bwd_kernel,
)
from fastroute.backends.triton._recording import launch
from fastroute.backends.triton._tiles import batch_strides
from fastroute.backends.triton.mix import launch_sum_parts, mix_bwd_kernel
from fastroute.ops._paths import channels_first, empty_path


@functools.cache
def _chip(device: torch.device) -> tables.Chip:
    if device.type == "cpu":
        return tables.INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    return tables.Chip(properties.multi_processor_count, properties.L2_cache_size)


@functools.lru_cache(maxsize=4096)
def _plan(problem: tables.Problem, chip: tables.Chip) -> tables.Resident | tables.Fused | tables.Split:
    return tables.plan(problem, chip)


def problem_of(
    x: torch.Tensor, m: int, n: int, w1: torch.Tensor | None, backward: bool, relu: bool = False
) -> tables.Problem:
    return tables.Problem(
        batch=x.shape[0],
        m=m,
        n=n,
        channels=x.shape[1],
        space=math.prod(x.shape[2:]),
        gate_channels=0 if w1 is None else w1.shape[1],
        itemsize=x.itemsize,
        channels_last=x.dim() == 2 or not channels_first(x),
        backward=backward,
        relu=relu,
    )


def gate_of(w1, b1, w2, b2) -> tuple[torch.Tensor | None, ...]:
    """`gate` of the kernels: parameters in float32, whatever the paths are."""
    w1, b1, w2, b2 = (None if p is None else p.float().contiguous() for p in (w1, b1, w2, b2))
    return w2 if w1 is None else w1, b1, w2, b2


def program_of(problem: tables.Problem, settings: tables.Resident | tables.Fused | tables.Split) -> dict[str, int]:
    """Warps and registers of every program of a launch."""
    return {"num_warps": settings.num_warps, "maxnreg": tables.max_registers(problem.m, problem.n)}


def tile_of_problem(problem: tables.Problem, settings: tables.Resident | tables.Fused | tables.Split) -> dict[str, int]:
    """The tiles of a kernel that walks over [C, S], and its programs."""
    tile = {"BC": settings.block_c, "BS": settings.block_s, "LAST": problem.channels_last}
    return tile | program_of(problem, settings)


class Pooling:
    """The first launch of the split tier, for chunks of samples: Z, and w·Z in parts that all programs add up."""

    def __init__(self, problem: tables.Problem, settings: tables.Split, x: torch.Tensor, pooled: torch.Tensor):
        self.problem, self.settings, self.pooled = problem, settings, pooled
        self.blocks = triton.cdiv(problem.channels, settings.block_c)
        self.spans = triton.cdiv(problem.space, settings.span)
        self.parts = self.blocks * self.spans
        rows = (problem.batch, problem.m)
        k = problem.gate_channels or problem.n
        self.partials = x.new_empty((*rows, self.parts, k), dtype=torch.float32)
        self.sums = pooled
        if self.spans > 1:
            self.sums = x.new_empty((*rows, self.spans, problem.channels), dtype=torch.float32)

    def launch(self, paths: tuple, w: torch.Tensor, first: int, chunk: int, relu: bool) -> None:
        problem = self.problem
        launch(cross_connect_pool_fwd_kernel, (chunk, self.parts, problem.m))(
            *paths,
            w,
            self.sums,
            self.partials,
            (problem.channels, problem.space, problem.channels * problem.space),
            self.blocks,
            self.settings.span,
            first,
            RELU=relu,
            K=w.shape[1],
            **tile_of_problem(problem, self.settings),
        )

    def finish(self) -> None:
        """Z of all samples, where it came in parts."""
        if self.spans > 1:
            rows = self.problem.batch * self.problem.m
            launch_sum_parts(self.sums, self.pooled, rows, self.spans, self.problem.channels)


def empty_gradients(gates: torch.Tensor, w1: torch.Tensor | None, w2: torch.Tensor) -> tuple[torch.Tensor, ...]:
    shapes = ((0,), (0,)) if w1 is None else (w1.shape, w1.shape[:2])
    return tuple(gates.new_empty(shape) for shape in (*shapes, w2.shape, w2.shape[:2]))


def launch_weights(d_saved: tuple, pooled: torch.Tensor, hidden: torch.Tensor, grads: tuple, problem: tables.Problem):
    """The gradients of all parameters, from dA and dH."""
    tiles = [
        triton.cdiv(rows, tables.ROWS) * triton.cdiv(columns, tables.COLUMNS)
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
        SAMPLES=tables.SAMPLES,
        ROWS=tables.ROWS,
        COLUMNS=tables.COLUMNS,
        num_warps=tables.WEIGHT_GRAD_WARPS,
    )


def cross_connect(xs, w1, b1, w2, b2, relu):
    x, m, n = xs[0], len(xs), w2.shape[1]
    problem = problem_of(x, m, n, w1, backward=False, relu=relu)
    batch, channels, size = problem.batch, problem.channels, problem.channels * problem.space
    outputs = [empty_path(x) for _ in range(n)]
    rows = (n, n, channels, problem.gate_channels)
    saved = tuple(x.new_empty((batch, m, row), dtype=torch.float32) for row in rows)  # gates, scores, Z, H
    if batch == 0:
        return outputs, *saved
    settings = _plan(problem, _chip(x.device))
    program, tile = program_of(problem, settings), tile_of_problem(problem, settings)
    sizes, options = (channels, problem.space, size), {"RELU": relu, "G": problem.gate_channels}
    paths, ys, gate = (tuple(xs), batch_strides(xs)), tuple(outputs), gate_of(w1, b1, w2, b2)
    with torch.cuda.device_of(x):
        if isinstance(settings, tables.Resident):
            launch(cross_connect_resident_fwd_kernel, (batch,))(*paths, ys, gate, saved, sizes, **options, **tile)
        elif isinstance(settings, tables.Fused):
            launch(cross_connect_fused_fwd_kernel, (batch,))(
                *paths, ys, gate, saved, sizes, BLOCK=settings.block, **options, **tile
            )
        else:
            pooling = Pooling(problem, settings, x, saved[2])
            for first in range(0, batch, settings.chunk):
                chunk = min(settings.chunk, batch - first)
                pooling.launch(paths, gate[0], first, chunk, relu)
                launch(cross_connect_mix_fwd_kernel, (chunk, triton.cdiv(size, settings.portion)))(
                    *paths,
                    ys,
                    gate,
                    saved,
                    pooling.partials,
                    pooling.parts,
                    size,
                    settings.portion,
                    first,
                    **options,
                    PARTS=max(1, tables.PARTIAL_VALUES // problem.gate_block),
                    BLOCK=settings.block,
                    **program,
                )
            pooling.finish()
    return outputs, *saved


def cross_connect_backward(
    grad_outputs, grad_gates, grad_scores, xs, w1, b1, w2, b2, gates, pooled, hidden, relu, grad_inputs
):
    x, m, n = xs[0], len(xs), len(grad_outputs)
    problem = problem_of(x, m, n, w1, backward=True, relu=relu)
    batch, channels, size = problem.batch, problem.channels, problem.channels * problem.space
    grad_xs = [empty_path(x) for _ in xs] if grad_inputs else []
    grads = empty_gradients(gates, w1, w2)
    if batch == 0:
        return grad_xs, *(grad.zero_() for grad in grads)
    settings = _plan(problem, _chip(x.device))
    program, tile = program_of(problem, settings), tile_of_problem(problem, settings)
    sizes = (channels, problem.space, size)
    options = {"GRAD_INPUTS": grad_inputs, "RELU": relu, "G": problem.gate_channels}
    paths, dys = (tuple(xs), batch_strides(xs)), (tuple(grad_outputs), batch_strides(grad_outputs))
    dxs = tuple(grad_xs if grad_inputs else xs)  # without GRAD_INPUTS nothing is written there
    incoming = tuple(None if grad is None else grad.contiguous() for grad in (grad_gates, grad_scores))
    d_saved = (torch.empty_like(gates), torch.empty_like(hidden))  # dA, dH
    common = (gate_of(w1, b1, w2, b2), (gates, hidden), incoming, d_saved)
    with torch.cuda.device_of(x):
        if isinstance(settings, tables.Resident):
            launch(cross_connect_resident_bwd_kernel, (batch,))(*paths, *dys, dxs, *common, sizes, **options, **tile)
        elif isinstance(settings, tables.Fused):
            launch(cross_connect_fused_bwd_kernel, (batch,))(
                *paths, *dys, dxs, *common, sizes, BLOCK=settings.block, **options, **tile
            )
        else:
            parts = triton.cdiv(size, settings.portion)
            blocks, spans = triton.cdiv(channels, settings.block_c), triton.cdiv(problem.space, settings.span)
            if not grad_inputs:
                blocks = spans = 1  # one program for each sample, for the gates alone
            partials = gates.new_empty((batch, parts, m, n))
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
                )
                launch(cross_connect_inputs_bwd_kernel, (chunk, blocks * spans))(
                    *paths,
                    *dys,
                    dxs,
                    *common,
                    partials,
                    parts,
                    sizes,
                    blocks,
                    settings.span,
                    first,
                    **options,
                    PARTS=tables.PARTIAL_VALUES // triton.next_power_of_2(n),
                    **tile,
                )
        launch_weights(d_saved, pooled, hidden, grads, problem)
    return grad_xs, *grads
