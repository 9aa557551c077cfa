import mmap

import pytest
import torch

from fastroute import ops, use_backend
from fastroute.ops._paths import channels_first, channels_last
from tests.backends.triton_kernels.cases import (
    CASES,
    KERNELS,
    cc,
    check_routing,
    force,
    make_gate,
    make_paths,
    mx,
    route,
    tables,
)
from tests.backends.triton_kernels.devices import on_card, on_host


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("tier", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_every_tier(device, tier, case, activation, monkeypatch, poison, launches):
    torch.manual_seed(0)
    m, n, shape, dtype, layout, hidden, bias = CASES[case]
    xs = make_paths(m, shape, dtype, device, layout)
    force(monkeypatch, tier)
    got = check_routing(xs, make_gate(m, n, shape[1], hidden, device, bias), activation=activation)
    assert [launch.kernel for launch in launches] == [*KERNELS[tier], "cross_connect_weights_bwd_kernel"]
    in_layout = channels_last if layout == "last" else channels_first
    assert all(in_layout(got[name]) for name in got if name[0] == "y" or name[:2] == "dx")
    read = launches[0].args[0]  # the kernels read the paths where they lie
    assert [x.data_ptr() for x in read] == [x.data_ptr() for x in xs]


SMALL_STEPS = {"block_c": 4, "block_s": 8, "block": 64, "portion": 192, "span": 16, "chunk": 2, "num_warps": 1}


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", ["first", "last", "flat"])
@pytest.mark.parametrize("tier", ["fused", "split"])
def test_loops_and_chunks(device, tier, layout, activation, monkeypatch, poison, launches):
    """Every loop takes several steps, the last of them partial, and the batch several chunks."""
    torch.manual_seed(1)
    flat = layout == "flat"
    monkeypatch.setattr(tables, "NARROW_BYTES", 8 if flat else 0)
    force(monkeypatch, tier, **SMALL_STEPS | ({"block_s": 64, "span": 64} if flat else {}))
    monkeypatch.setattr(tables, "PARTIAL_VALUES", 8)
    monkeypatch.setattr(tables, "SAMPLES", 2)
    xs = make_paths(2, (3, 6, 7, 5), torch.float32, device, "first" if flat else layout)
    check_routing(xs, make_gate(2, 3, 6, 5, device), activation=activation)
    kernels = [launch.kernel for launch in launches]
    layouts = {launch.settings["LAYOUT"] for launch in launches if "LAYOUT" in launch.settings}
    assert layouts == {layout}
    if tier == "split" and not flat:
        assert kernels == [*KERNELS["split"][:3] * 2, *KERNELS["split"][3:] * 2, kernels[-1]]
        assert [launch.grid for launch in launches[:6]] == [(2, 6, 2), (2,), (2, 2), (1, 6, 2), (1,), (1, 2)]


@pytest.mark.parametrize("tier", KERNELS)
@pytest.mark.parametrize("present", [(True, False, False), (False, True, False), (False, False, True)])
def test_absent_gradients(device, tier, present, monkeypatch, poison):
    torch.manual_seed(2)
    force(monkeypatch, tier)
    check_routing(make_paths(2, (2, 4, 3), torch.float32, device), make_gate(2, 2, 4, 3, device), present)


@pytest.mark.parametrize("tier", KERNELS)
def test_inputs_without_gradient(device, tier, monkeypatch, launches):
    torch.manual_seed(3)
    force(monkeypatch, tier)
    xs, gate = make_paths(2, (2, 4, 3), torch.float32, device), make_gate(2, 2, 4, 3, device)
    expected = check_routing(xs, gate, (True, False, False))
    launches.clear()
    gate = [p.clone().requires_grad_() for p in gate]
    torch.manual_seed(3)
    make_paths(2, (2, 4, 3), torch.float32, device), make_gate(2, 2, 4, 3, device)
    with use_backend("triton"):
        outputs = ops.cross_connect(xs, *gate).outputs
        torch.autograd.backward(outputs, [torch.randn(2, 4, 3, device=device) for _ in outputs])
    assert not any(launch.settings.get("GRAD_INPUTS") for launch in launches)
    for name, parameter in zip(("dw1", "db1", "dw2", "db2"), gate, strict=True):
        torch.testing.assert_close(parameter.grad, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("tier", KERNELS)
def test_extreme_scores(device, tier, monkeypatch):
    torch.manual_seed(4)
    force(monkeypatch, tier)
    w1, b1, w2, _ = make_gate(2, 3, 4, 3, device)
    b2 = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], device=device)
    got = check_routing(make_paths(2, (2, 4, 3), torch.float32, device), (w1, b1, w2, b2))
    assert got["gates"][:, 0].eq(torch.tensor([1.0, 0.0, 0.0], device=device)).all()


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("tier", KERNELS)
def test_nan_is_not_hidden(device, tier, activation, monkeypatch):
    force(monkeypatch, tier)
    xs, gate = make_paths(1, (2, 4, 3), torch.float32, device), make_gate(1, 2, 4, 3, device)
    xs[0][1, 2, 0] = float("nan")
    with use_backend("triton"):
        outputs, gates, _ = ops.cross_connect(xs, *gate, activation)
    assert gates[1].isnan().all() and outputs[0][1].isnan().all()
    assert not gates[0].isnan().any() and not outputs[0][0].isnan().any()


@pytest.mark.parametrize("tier", KERNELS)
def test_half_precision_parameters(device, tier, monkeypatch):
    torch.manual_seed(5)
    force(monkeypatch, tier)
    gate = make_gate(2, 2, 4, 3, device, dtype=torch.bfloat16)
    got = check_routing(make_paths(2, (2, 4, 3), torch.bfloat16, device), gate)
    assert got["gates"].dtype == torch.float32 and got["dw1"].dtype == torch.bfloat16


@pytest.mark.parametrize("tier", ["fused", "split"])
def test_large_maps_are_summed_in_blocks(device, tier, monkeypatch):
    """One running sum of 2^16 values near 100 would be off by 1e-2."""
    torch.manual_seed(6)
    force(monkeypatch, tier)
    xs = [100 + x for x in make_paths(1, (1, 2, 256, 256), torch.float32, device)]
    check_routing(xs, make_gate(1, 2, 2, 3, device))


@pytest.mark.parametrize("tier", KERNELS)
def test_same_bits_again(device, tier, monkeypatch):
    torch.manual_seed(7)
    force(monkeypatch, tier, chunk=2)
    xs, gate = make_paths(2, (5, 4, 6, 6), torch.float32, device), make_gate(2, 2, 4, 3, device)
    grads = [torch.randn_like(xs[0]) for _ in range(2)] + [torch.randn(5, 2, 2, device=device) for _ in range(2)]
    first, second = (route("triton", xs, gate, grads) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_empty_batch(device, launches):
    xs = make_paths(2, (0, 4, 3, 3), torch.float32, device)
    gate = make_gate(2, 3, 4, 3, device)
    got = route("triton", xs, gate, [xs[0]] * 3 + [torch.empty(0, 2, 3, device=device)] * 2)
    assert got["y0"].shape == (0, 4, 3, 3) and got["gates"].shape == (0, 2, 3)
    assert not got["dw1"].any() and not got["db2"].any()
    static = torch.randn(2, 2, device=device, requires_grad=True)
    with use_backend("triton"):
        ops.mix([x.requires_grad_() for x in xs], static)[0].sum().backward()
    assert not static.grad.any() and not launches


def test_batch_at_once(device, monkeypatch, launches):
    torch.manual_seed(13)
    monkeypatch.setattr(tables, "SPLIT_BY", "batch")
    monkeypatch.setattr(cc, "_plan", tables.split)
    check_routing(make_paths(2, (5, 4, 6, 6), torch.float32, device), make_gate(2, 2, 4, 3, device))
    assert [launch.grid[0] for launch in launches[:6]] == [5] * 6


def test_offsets_beyond_int32(device, monkeypatch):
    """Samples 2^30 + 64 elements apart. In int32 the third would be read 2^31 − 128 before the first, where zeros are.

    On the CPU the memory is only reserved: no page of it exists but those that hold the samples.
    """
    torch.manual_seed(9)
    stride, count = 2**30 + 64, 2**32 + 2**12
    if device == "cpu":
        no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python does not name
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        memory = torch.frombuffer(mmap.mmap(-1, 2 * count, flags=flags), dtype=torch.float16)
    else:
        memory = torch.zeros(count, dtype=torch.float16, device=device)
    far = [memory[2**31 + 512 * k :].as_strided((3, 4, 6), (stride, 6, 1)) for k in range(2)]
    for x in far:
        x.copy_(torch.randn(x.shape))
    near = [x.clone() for x in far]
    gate = make_gate(1, 1, 4, 3, device)
    for tier in KERNELS:
        force(monkeypatch, tier)
        results = []
        for x, dy in (far, near):
            outputs, gates, _, pooled, hidden = cc.cross_connect([x], *gate, True)
            backward = cc.cross_connect_backward([dy], None, None, [x], *gate, gates, pooled, hidden, True, True)
            results.append([*outputs, gates, pooled, hidden, *backward[0], *backward[1:]])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), tier
    gates = torch.ones(3, 1, 1, device=device)
    results = [[*mx.mix([x], gates), mx.mix_backward([dy], [x], gates, False)[1]] for x, dy in (far, near)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@on_host
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("tier", KERNELS)
def test_bytes(tier, relu, monkeypatch):
    """The resident tier reads and writes every path once; the others read once more what is needed twice.

    The backward of a ReLU reads X once more, to see where it is above zero.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    torch.manual_seed(10)
    m, n, shape = 2, 3, (3, 6, 5, 7)
    xs, dys = make_paths(m, shape, torch.float32, "cpu"), make_paths(n, shape, torch.float32, "cpu")
    gate = make_gate(m, n, 6, 4, "cpu")
    force(monkeypatch, tier)
    touched = {"load": [], "store": []}

    def count(kind, name):
        call = getattr(InterpreterBuilder, name)

        def counting(self, ptrs, *args):
            mask = args[0] if kind == "load" else args[1]
            touched[kind].append(ptrs.data[mask.data])
            return call(self, ptrs, *args)

        monkeypatch.setattr(InterpreterBuilder, name, counting)

    count("load", "create_masked_load")
    count("store", "create_masked_store")

    def passes(kind, tensors):
        """How often each of the tensors is gone through, all of it."""
        addresses = torch.cat([torch.from_numpy(a.reshape(-1).astype("int64")) for a in touched[kind]])
        counts = []
        for tensor in tensors:
            begin = tensor.data_ptr()
            inside = addresses[(addresses >= begin) & (addresses < begin + 4 * tensor.numel())]
            times = torch.bincount((inside - begin) // 4, minlength=tensor.numel())
            assert times.min() == times.max()
            counts.append(times.min().item())
        return counts

    again = 1 if tier == "resident" else 2
    outputs, gates, _, pooled, hidden = cc.cross_connect(xs, *gate, relu)
    assert passes("load", xs) == [again] * m and passes("store", outputs) == [1] * n
    for kind in touched.values():
        kind.clear()
    grad_xs, *_ = cc.cross_connect_backward(dys, None, None, xs, *gate, gates, pooled, hidden, relu, True)
    assert passes("load", xs) == [1 + relu] * m and passes("load", dys) == [again] * n
    assert passes("store", grad_xs) == [1] * m


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_card)])
@pytest.mark.parametrize("tier", KERNELS)
def test_graph_capture(device, tier, monkeypatch):
    """No launch waits for the host: a captured step gives the same result when it is replayed."""
    force(monkeypatch, tier)
    xs, gate = make_paths(2, (4, 16, 8, 8), torch.float32, device), make_gate(2, 2, 16, 4, device)
    expected = cc.cross_connect(xs, *gate, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, gates, *_ = cc.cross_connect(xs, *gate, False)
    graph.replay()
    assert torch.equal(gates, expected[1]) and all(map(torch.equal, outputs, expected[0]))
