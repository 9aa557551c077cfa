"""Which kernels are chosen, by the sizes of the paths and of the chip."""

import ctypes

import pytest
import torch

from tests.backends.cuda_kernels.cases import A100, H100, PLAN, TWO_PASSES, make_case


def test_plan_of_large_maps(emulated):
    """The one-read kernel runs for two float32 paths of 64 × 56 × 56; three do not fit, nor a misaligned sample."""
    expected = {(2, torch.float32): 8, (3, torch.float32): TWO_PASSES, (2, torch.bfloat16): 8, (3, torch.bfloat16): 8}
    for (m, dtype), cluster in expected.items():
        xs, parameters, _, _ = make_case(m, 2, (1, 64, 56, 56), 16, True, dtype, "contiguous")
        emulated.cross_connect(xs, *parameters, False)
        assert emulated.namespace.cuda_last_cluster() == cluster, (m, dtype)
    xs, parameters, _, _ = make_case(2, 2, (1, 3, 5, 7), 16, True, torch.float32, "contiguous")
    emulated.cross_connect(xs, *parameters, False)
    assert emulated.namespace.cuda_last_cluster() == TWO_PASSES
    emulated.namespace.cuda_force_cluster(2)
    with pytest.raises(RuntimeError, match="cannot hold these paths"):
        emulated.cross_connect(xs, *parameters, False)
    emulated.namespace.cuda_force_cluster(PLAN)


def test_plan(emulated):
    """By count: H100 has 132 multiprocessors of 228 KB, a block may have 227 KB; two blocks fit in 113 KB each."""

    def plan(paths, elements, samples, extra=4096, device=H100):
        return emulated.namespace.cuda_plan(paths, 4 * elements, extra, samples, *device)

    assert plan(2, 16 * 32 * 32, 128) == 2  # 128 KB do not go twice into a multiprocessor
    assert plan(2, 32 * 16 * 16, 128) == 1  # 64 KB do
    assert plan(2, 128 * 28 * 28, 32) == 8
    assert plan(2, 256 * 14 * 14, 32) == 4
    assert plan(2, 64 * 56 * 56, 32) == 8  # 196 KB: one block to a multiprocessor
    assert plan(3, 64 * 56 * 56, 32) == TWO_PASSES  # 294 KB
    assert plan(2, 32 * 16 * 16, 4) == 8  # few samples are spread, to 4 KB of each path for a block
    assert plan(2, 16 * 16 * 16, 4) == 4  # of 16 KB
    assert plan(2, 32 * 16 * 16, 32) == 4  # and to no more blocks than multiprocessors
    assert plan(2, 32 * 16 * 16, 128, extra=240 * 1024) == TWO_PASSES
    assert plan(2, 32 * 16 * 16, 128, device=A100) == TWO_PASSES
    architecture, _, *shared = H100
    assert plan(2, 64 * 56 * 56, 32, device=(architecture, 8, *shared)) == 8
    assert plan(2, 64 * 56 * 56, 32, device=(architecture, 7, *shared)) == TWO_PASSES  # part of a card


def integers(*values):
    return (ctypes.c_int64 * len(values))(*values)


def test_where_one_read_serves(emulated):
    """As choosing between kernels asks it, by sizes alone."""

    def clusters(m, n, samples, channels, space, channels_last=False, hidden=16, bytes=2, relu=False, device=H100):
        sizes = integers(samples, channels, space, channels_last, m, n, hidden, bytes, relu)
        return [emulated.entries.emulator_cluster(forward, sizes, integers(*device)) for forward in (True, False)]

    assert clusters(2, 2, 256, 64, 56 * 56) == [8, 8]
    assert clusters(2, 2, 256, 64, 56 * 56, bytes=4) == [8, 8]
    assert clusters(2, 3, 256, 64, 56 * 56, bytes=4) == [8, TWO_PASSES]  # the forward holds X, the backward dY
    assert clusters(3, 2, 256, 64, 56 * 56, bytes=4) == [TWO_PASSES, 8]
    assert clusters(6, 2, 256, 64, 56 * 56, bytes=4) == [TWO_PASSES, 8]
    assert clusters(6, 2, 256, 64, 56 * 56, bytes=4, relu=True) == [TWO_PASSES, TWO_PASSES]  # and the signs of X
    assert clusters(2, 2, 128, 32, 16 * 16) == [1, 1]
    assert clusters(2, 2, 128, 32, 16 * 16, device=A100) == [TWO_PASSES, TWO_PASSES]
    assert clusters(2, 2, 128, 32, 16 * 16, bytes=8) == [TWO_PASSES, TWO_PASSES]
    assert clusters(2, 2, 128, 3, 5 * 7) == [TWO_PASSES, TWO_PASSES]  # 210 bytes
    assert clusters(2, 2, 128, 512, 7 * 7) == [1, 1]
    assert clusters(8, 8, 256, 13, 32 * 16) == [1, 1]  # 106 KB of a half of 113
    assert clusters(8, 8, 256, 13, 32 * 16, channels_last=True) == [2, 1]  # and 8 in which columns are added up


def test_where_the_gate_is_held(emulated):
    """Beside the paths, unless it took the place of one of two blocks of a multiprocessor, or there is no such room."""

    def holds(kilobytes, gate, device=H100):
        return emulated.entries.emulator_holds_gate(1024 * kilobytes, 1024 * gate, integers(*device))

    assert holds(60, 50) and holds(100, 12) and holds(200, 27) and holds(115, 64)
    assert not holds(100, 14) and not holds(200, 28) and not holds(60, 50, (90, 132, 99 * 1024, 228 * 1024))
