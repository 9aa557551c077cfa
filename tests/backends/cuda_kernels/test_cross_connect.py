import random

import pytest
import torch

from tests.backends.cuda_kernels.cases import (
    ALIGNED,
    DTYPES,
    LAYOUTS,
    ODD,
    PLAN,
    TWO_PASSES,
    check_cross_connect,
    converted,
    force,
    grid,
    label,
    make_case,
    tensors,
)


@grid(sizes=ALIGNED + ODD, dtype=DTYPES, layout=LAYOUTS, relu=(False, True))
def test_two_passes(kernels, sizes, dtype, layout, relu):
    force(kernels, TWO_PASSES)
    check_cross_connect(kernels, make_case(*sizes, dtype, layout), relu=relu)
    assert kernels.namespace.cuda_last_cluster() == TWO_PASSES


@grid(sizes=ALIGNED, cluster=(1, 2, 4, 8), dtype=DTYPES[:3], layout=LAYOUTS, relu=(False, True))
def test_clusters(kernels, sizes, cluster, dtype, layout, relu):
    force(kernels, cluster)
    check_cross_connect(kernels, make_case(*sizes, dtype, layout), relu=relu)
    assert kernels.namespace.cuda_last_cluster() == cluster


def test_the_last_cluster_is_that_of_the_last_call(kernels):
    """Also where there never is one: in float64, and in a backward without dX."""
    force(kernels, 2)

    def forward(case):
        xs, parameters, *_ = case
        return kernels.cross_connect(xs, *parameters, False)

    single, double = (
        converted(make_case(*ALIGNED[0], dtype, "contiguous"), kernels.device)
        for dtype in (torch.float32, torch.float64)
    )

    def last(case, grad_inputs=None):
        xs, parameters, grad_outputs, grads = case
        _, gates, _, pooled, hidden = forward(case)
        forward(single)
        if grad_inputs is None:
            forward(case)
        else:
            saved = (*parameters, gates, pooled, hidden)
            kernels.cross_connect_backward(grad_outputs, *grads, xs, *saved, False, grad_inputs)
        return kernels.namespace.cuda_last_cluster()

    assert [last(single, what) for what in (None, True, False)] == [2, 2, TWO_PASSES]
    assert [last(double, what) for what in (None, True, False)] == [TWO_PASSES] * 3


SEVERAL = [(2, 2, (5, 16, 12, 12), 5, True), (3, 5, (5, 16, 12, 12), 5, True)]


@grid(sizes=SEVERAL, cluster=(1, 2), dtype=DTYPES[:3], layout=LAYOUTS, relu=(False, True))
def test_a_cluster_takes_several_samples_in_several_pieces(kernels, sizes, cluster, dtype, layout, relu):
    check_several(kernels, sizes, cluster, dtype, layout, relu)


def check_several(kernels, sizes, cluster, dtype, layout, relu):
    force(kernels, cluster)
    m, n, (samples, *rest), *gate = sizes
    samples = samples if kernels.device == "cpu" else 600
    check_cross_connect(kernels, make_case(m, n, (samples, *rest), *gate, dtype, layout), relu=relu)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=label)
def test_a_cluster_refills_its_memory(kernels, dtype, relu):
    """The same, in as few cases as compute-sanitizer can watch on a card (benchmarks/gpu_worker.py)."""
    check_several(kernels, SEVERAL[0], 2, dtype, "contiguous", relu)


@pytest.mark.parametrize("cluster", [TWO_PASSES, 2])
@pytest.mark.parametrize(("absent_grads", "grad_inputs"), [(True, True), (False, False), (True, False)])
def test_optional_gradients(kernels, cluster, absent_grads, grad_inputs):
    force(kernels, cluster)
    check_cross_connect(kernels, make_case(*ALIGNED[0], torch.float32, "contiguous"), absent_grads, grad_inputs)


@pytest.mark.parametrize("cluster", [TWO_PASSES, 2])
def test_float32_parameters_beside_bfloat16_paths(kernels, cluster):
    force(kernels, cluster)
    case = make_case(*ALIGNED[0], torch.bfloat16, "channels_last", parameter_dtype=torch.float32)
    check_cross_connect(kernels, case)


@pytest.mark.parametrize("cluster", [TWO_PASSES, 2])
def test_extreme_scores(kernels, cluster):
    force(kernels, cluster)
    xs, (w1, b1, w2, _), grad_outputs, grads = make_case(*ALIGNED[0], torch.float32, "contiguous")
    b2 = torch.tensor([[1e4, -1e4], [-1e4, 1e4]])
    check_cross_connect(kernels, (xs, (w1, b1, w2, b2), grad_outputs, grads))


@pytest.mark.parametrize("hidden", [8, 64])
def test_gates_too_large_to_hold(kernels, hidden):
    """100 KB of paths to a block, beside 4 KB of a gate that are held, and 32 KB that are not."""
    force(kernels, 1)
    case = make_case(2, 2, (1, 64, 14, 14), hidden, True, torch.float32, "contiguous")
    check_cross_connect(kernels, case)
    if kernels.device == "cpu":
        xs, parameters, *_ = case
        kernels.cross_connect(xs, *parameters, False)
        assert (kernels.entries.emulator_shared_bytes() > 102 * 1024) == (hidden == 8)


def random_check(kernels, seed):
    draw = random.Random(seed)
    m, n = draw.randint(1, 8), draw.randint(1, 8)
    space = draw.choice([(), (1,), (64,), (1, 1), (5, 7), (7, 7), (8, 8), (13, 13), (32, 32), (2, 3, 4), (4, 4, 4)])
    shape = (draw.choice([0, 1, 3, 17]), draw.choice([1, 3, 16, 33, 64, 130]), *space)
    layout, dtype = draw.choice(LAYOUTS), draw.choice(DTYPES)
    case = make_case(m, n, shape, draw.choice([0, 1, 5, 16, 40]), draw.random() < 0.5, dtype, layout, seed)
    force(kernels, PLAN)
    check_cross_connect(kernels, case, draw.random() < 0.3, draw.random() < 0.8, draw.random() < 0.5)


@pytest.mark.parametrize("seed", range(6))
def test_random_sizes(kernels, seed):
    random_check(kernels, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 100))
def test_more_random_sizes(emulated, seed):
    random_check(emulated, seed)


def test_samples_more_than_two_gigabytes_apart(emulated):
    """Batch strides past 2³¹ elements, on memory that is reserved and, but for the samples, never touched."""
    stride, (channels, space) = 2**31 + 64, (16, 64)

    def far(x):
        y = torch.empty(stride + channels * space, dtype=x.dtype).as_strided(x.shape, (stride, space, 1))
        return y.copy_(x)

    sizes = (2, 2, (2, channels, space), 5, True)
    xs, parameters, grad_outputs, grads = make_case(*sizes, torch.bfloat16, "contiguous")
    case = [far(x) for x in xs], parameters, [far(x) for x in grad_outputs], grads
    for cluster in (TWO_PASSES, 2):
        force(emulated, cluster)
        check_cross_connect(emulated, case)
    force(emulated, PLAN)


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [TWO_PASSES, 2])
def test_graph_capture(card, cluster):
    force(card, cluster)
    xs, parameters, grad_outputs, grads = converted(make_case(*ALIGNED[0], torch.float32, "contiguous"), device="cuda")

    def step():
        outputs, gates, _scores, pooled, hidden = card.cross_connect(xs, *parameters, False)
        return outputs, card.cross_connect_backward(
            grad_outputs, *grads, xs, *parameters, gates, pooled, hidden, False, True
        )

    expected = tensors(step())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = tensors(step())
    for result in results:
        result.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))
    force(card, PLAN)
