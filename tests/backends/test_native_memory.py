"""The memory of outputs, which is kept from one call to the next."""

import multiprocessing
import resource
import threading
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from fastroute import ops, use_backend
from fastroute.backends import BACKENDS

LARGE = (2, 8, 128, 128)  # 1 MiB in float32


@pytest.fixture(autouse=True)
def native():
    if reason := BACKENDS["native"].reason_against(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    with use_backend("native"):
        yield


def mixed(shape=LARGE, paths=2, dtype=torch.float32):
    xs = [torch.randn(shape, dtype=dtype) for _ in range(paths)]
    return xs, ops.mix(xs, torch.full((paths, paths), 1 / paths))


def addresses(tensors):
    return {t.data_ptr() for t in tensors}


def test_the_next_call_takes_the_memory_that_the_last_left():
    first = addresses(mixed()[1])
    assert addresses(mixed()[1]) == first
    assert all(address % 64 == 0 for address in first)


def test_cross_prediction_takes_it_too():
    def predicted():
        x = torch.randn(LARGE)
        weight = torch.randn(1, 2, *LARGE[1:2] * 2, 1, 1)
        return ops.cross_predict([x], weight, None, torch.ones(LARGE[0], 1, 2))

    first = addresses(predicted())
    assert addresses(predicted()) == first


@pytest.mark.parametrize(
    "strides", [(8 * 128 * 128, 128 * 128, 128, 1), (1 << 20, 1, 8 * 128, 8)], ids=["dense", "apart"]
)
def test_it_comes_with_the_strides_asked_for(strides):
    y = torch.ops.fastroute_native.new_empty_strided(torch.empty(0, dtype=torch.float64), LARGE, strides)
    assert (y.shape, y.stride(), y.dtype) == (LARGE, strides, torch.float64)
    assert torch.equal(y.fill_(2.0), torch.full(LARGE, 2.0, dtype=torch.float64))


def test_memory_in_use_is_left_alone():
    _, kept = mixed()
    copies = [y.clone() for y in kept]
    view = mixed()[1][0][0, 0]  # holds the memory of an output that is gone otherwise
    copy = view.clone()
    for _ in range(3):
        assert not addresses(mixed()[1]) & (addresses(kept) | addresses([view]))
    assert all(torch.equal(y, c) for y, c in zip(kept, copies, strict=True)) and torch.equal(view, copy)


def in_a_process(function):
    """Run where no memory has been kept before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function).result()


def test_no_more_than_256_mib_is_kept_of_what_was_never_in_use_together():
    assert 128 << 20 < in_a_process(kept_of_460_mib) < 320 << 20


def kept_of_460_mib():
    before = resident()
    for height in range(256, 1024, 64):  # each size is new
        x = torch.zeros(1, 64, height, 128)
        with use_backend("native"):
            ops.mix([x, x], torch.full((2, 2), 0.5))
        del x
    return resident() - before


def new_paths(count, channels):
    """Return new tensors of 64 KiB a channel, written to."""
    like = torch.empty(0)
    new = torch.ops.fastroute_native.new_empty_strided
    return [new(like, (channels, 128, 128), (128 * 128, 128, 1)).fill_(1) for _ in range(count)]


def test_a_step_finds_the_memory_of_the_last_whatever_its_size():
    first, second, others, kept, kept_later = in_a_process(steps_of_400_mib)
    assert first == second
    assert 380 << 20 < kept < 560 << 20 and others
    assert kept_later < 300 << 20


def steps_of_400_mib():
    def step():
        """Take blocks of 24 MiB, and leave all but the last for as many of 8 MiB, as a backward leaves its maps."""
        maps = new_paths(16, 384)
        found = addresses(maps)
        del maps[1:]
        return found | addresses(new_paths(4, 128))

    before = resident()
    first, second = step(), step()
    kept = resident() - before
    others = step() == second
    for _ in range(8192):
        new_paths(1, 2)
    return first, second, others, kept, resident() - before


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_threads_do_not_share_outputs():
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            xs = [torch.randn(LARGE, generator=generator) for _ in range(2)]
            ys = ops.mix(xs, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
            if not all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_an_output_can_grow():
    _, (y, _) = mixed()
    before = y[0].clone()
    y.resize_(4, *LARGE[1:])
    assert torch.equal(y[0], before)


def test_where_fresh_memory_is_to_be_filled_none_is_kept_memory():
    left = addresses(mixed()[1])
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with it, torch.utils.deterministic.fill_uninitialized_memory holds
    try:
        assert not addresses(mixed()[1]) & left
    finally:
        torch.use_deterministic_algorithms(deterministic)
