"""The form of the operators in compiled graphs: one node, or operations that Inductor fuses."""

import re

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

import fastroute
from fastroute import ops
from fastroute.nn import CrossConnection, CrossPrediction2d
from fastroute.ops import _compiled

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def cross_connect(xs, w1, b1, w2, b2):
    outputs, gates, scores = ops.cross_connect(xs, w1, b1, w2, b2, activation="relu")
    return *outputs, gates, scores


def gate(xs, w1, b1, w2, b2):
    return tuple(ops.gate(xs, w1, b1, w2, b2))


def mix(xs, w1, b1, w2, b2):
    return tuple(ops.mix(xs, w2[0, :2].softmax(0)))


def cross_predict(xs, w1, b1, w2, b2):
    gates = ops.gate(xs, w1, b1, w2, b2).gates
    weight = w1[:, :, None, :, None, None].expand(2, 4, 3, 8, 3, 3)
    return tuple(ops.cross_predict(xs, weight, None, gates, padding=1))


def mixture_em_loss(xs, w1, b1, w2, b2):
    return (ops.mixture_em_loss(ops.gate(xs, w1, b1, w2, b2).scores.float()).loss,)


FUNCTIONS = {f.__name__: f for f in (cross_connect, gate, mix, mixture_em_loss)}


class Compiler:
    """Decomposes and partitions as Inductor does, and runs what comes out as it is."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        from torch._inductor.decomposition import select_decomp_table

        def keep(graph, inputs):
            self.graphs.append(graph)
            return make_boxed_func(graph.forward)

        backend = aot_autograd(
            fw_compiler=keep, partition_fn=min_cut_rematerialization_partition, decompositions=select_decomp_table()
        )
        return backend(graph, inputs)

    def operators(self):
        nodes = [str(node.target) for graph in self.graphs for node in graph.graph.nodes]
        return {name.removesuffix(".default") for name in nodes if name.startswith("fastroute")}


def tensors(dtype, layout, batch=4):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    xs = [random(batch, 8, 6, 5).to(dtype).contiguous(memory_format=FORMATS[layout]) for _ in range(2)]
    parameters = [random(2, 4, 8), random(2, 4), random(2, 4, 4), random(2, 4)]
    return [x.requires_grad_() for x in xs], [p.requires_grad_() for p in parameters]


def results(function, xs, parameters):
    outputs = function(xs, *parameters)
    loss = sum((k + 1) * y.float().square().sum() for k, y in enumerate(outputs))
    return [*outputs, *torch.autograd.grad(loss, [*xs, *parameters], allow_unused=True)]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_fused_graph_computes_what_the_operator_does(name, dtype, layout):
    function, compiler = FUNCTIONS[name], Compiler()
    with fastroute.compile_form("fused"):
        compiled = torch.compile(function, backend=compiler, fullgraph=True, dynamic=True)
        for batch in (7, 9):
            given = tensors(dtype, layout, batch)
            found, wanted = results(compiled, *given), results(function, *given)
            for ours, theirs in zip(found, wanted, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
                    torch.testing.assert_close(ours, theirs, **tolerance(theirs))
    assert not compiler.operators() and len(compiler.graphs) == 2  # the forward's and the backward's


def tolerance(theirs):
    scale = max(theirs.abs().max().item(), 0.1)  # some gradients vanish but for rounding
    return {"rtol": 0, "atol": scale * (1e-5 if theirs.dtype == torch.float32 else 1e-2)}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_cross_prediction_is_fused_where_there_are_no_gradients(dtype, layout):
    compiler = Compiler()
    with fastroute.compile_form("fused"), torch.no_grad():
        compiled = torch.compile(cross_predict, backend=compiler, fullgraph=True, dynamic=True)
        for batch in (7, 9):
            xs, parameters = tensors(dtype, layout, batch)
            parameters = [p.to(dtype) for p in parameters]
            found, wanted = compiled(xs, *parameters), cross_predict(xs, *parameters)
            for ours, theirs in zip(found, wanted, strict=True):
                assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
                torch.testing.assert_close(ours, theirs, **tolerance(theirs))
    assert not compiler.operators()


def test_cross_prediction_stays_an_operator_with_gradients():
    compiler = Compiler()
    with fastroute.compile_form("fused"):
        results(torch.compile(cross_predict, backend=compiler, fullgraph=True), *tensors(torch.float32, "contiguous"))
    assert compiler.operators() == {"fastroute.cross_predict", "fastroute.cross_predict_backward"}


@pytest.mark.parametrize("form, operators", [("operator", {"fastroute::cross_connect"}), ("fused", set())])
def test_the_form_can_be_chosen(form, operators):
    router, compiler = CrossConnection(8, 2, 2).eval(), Compiler()
    with fastroute.compile_form(form), torch.no_grad():
        torch.compile(router, backend=compiler, fullgraph=True)([torch.randn(2, 8, 4, 4)] * 2)
    found = {name.replace(".", "::", 1) for name in compiler.operators()}
    assert found == operators


def test_a_change_of_form_is_compiled_anew():
    router, compiler = CrossConnection(8, 2, 2).eval(), Compiler()
    compiled, xs = torch.compile(router, backend=compiler, fullgraph=True), [torch.randn(2, 8, 4, 4)] * 2
    with torch.no_grad():
        for form in ("operator", "fused", "operator"):
            with fastroute.compile_form(form):
                compiled(xs)
    assert len(compiler.graphs) == 2


@pytest.mark.parametrize("router", [CrossConnection(8, 2, 2), CrossPrediction2d(8, 8, 2, 2, 3)], ids=["cc", "cp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("recorded", [False, True], ids=["without gradients", "with gradients"])
def test_a_cpu_fuses_routers_in_float32_without_gradients(router, dtype, recorded):
    compiler, xs = Compiler(), [torch.randn(2, 8, 4, 4, dtype=dtype)] * 2
    with torch.set_grad_enabled(recorded):
        torch.compile(router.to(dtype).eval(), backend=compiler, fullgraph=True)(xs)
    assert bool(compiler.operators()) == (recorded or dtype == torch.bfloat16)


def test_a_function_that_fuses_without_gradients_is_compiled_anew_with_them():
    router, xs, compiler = CrossConnection(8, 2, 2).eval(), [torch.randn(2, 8, 4, 4)] * 2, Compiler()
    compiled = torch.compile(router, backend=compiler, fullgraph=True)
    for recorded in (False, True, False):
        with torch.set_grad_enabled(recorded):
            compiled(xs)
    assert "fastroute.cross_connect" in compiler.operators()
    assert len(compiler.graphs) == 2


def test_a_named_backend_keeps_the_operator_unless_the_form_is_named():
    xs, router = [torch.randn(2, 8, 4, 4)] * 2, CrossConnection(8, 2, 2).eval()
    for named, operators in ((None, set()), ("reference", {"fastroute.cross_connect"})):
        compiler = Compiler()
        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(router, backend=compiler, fullgraph=True)
            if named is None:
                compiled(xs)
            else:
                with fastroute.use_backend(named):
                    compiled(xs)
        assert compiler.operators() == operators


def test_an_export_keeps_the_operator():
    router, xs = CrossConnection(8, 2, 2), [torch.randn(2, 8, 4, 4)] * 2
    with fastroute.compile_form("fused"):
        program = torch.export.export(router, (xs,), strict=True)
    assert any(str(node.target) == "fastroute.cross_connect.default" for node in program.graph.nodes)


def test_a_fused_graph_saves_no_more_than_the_operator():
    """Of maps, the paths alone: no path after its ReLU, no weighted path, no output."""
    compiler = Compiler()
    xs, parameters = tensors(torch.float32, "contiguous")
    with fastroute.compile_form("fused"):
        results(torch.compile(cross_connect, backend=compiler, fullgraph=True), xs, parameters)
    forward = compiler.graphs[0].graph
    given = {node for node in forward.nodes if node.op == "placeholder"}
    saved = [node for node in forward.output_node().args[0][6:] if node not in given]
    assert all(node.meta["val"].numel() < xs[0].numel() for node in saved), saved


def test_other_compilers_compute_a_fused_operator_by_its_backend():
    with fastroute.compile_form("fused"):
        given = tensors(torch.float32, "contiguous")
        compiled = torch.compile(cross_connect, backend="aot_eager", fullgraph=True)
        for ours, theirs in zip(results(compiled, *given), results(cross_connect, *given), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_form_is_restored_and_checked():
    with fastroute.compile_form("fused"), pytest.raises(RuntimeError), fastroute.compile_form("operator"):
        raise RuntimeError
    assert ops._compile_form._form == "auto"
    fastroute.compile_form("fused")
    assert ops._compile_form._form == "fused"
    fastroute.compile_form("auto")
    with pytest.raises(ValueError, match="form is 'inline'; it must be 'auto', 'fused' or 'operator'"):
        fastroute.compile_form("inline")


def test_wrong_tensors_are_refused_while_tracing():
    compiled = torch.compile(lambda xs, gates: ops.mix(xs, gates), backend="eager")
    with fastroute.compile_form("fused"), pytest.raises(Exception, match=r"gates have shape \(3, 2\)|gates has shape"):
        compiled([torch.randn(2, 8, 4, 4)] * 2, torch.rand(3, 2))


def test_strides_that_a_size_of_one_leaves_free_are_kept():
    x = torch.randn(4, 8, 1, 1).as_strided((4, 8, 1, 1), (8, 1, 8, 8))
    gates = torch.rand(4, 1, 2)
    with fastroute.compile_form("fused"):
        found = torch.compile(ops.mix, backend=Compiler(), fullgraph=True)([x], gates)
    for ours, theirs in zip(found, ops.mix([x], gates), strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs)


def test_maps_are_channels_last_where_inductor_computes_convolutions_so():
    torch.manual_seed(0)
    first, last, router = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1), CrossConnection(6, 2, 2)
    nn.init.normal_(router.w2)

    def network(x):
        y, z = router([first(x), first(x).relu()])
        return last(y) + last(z)

    def gradients(function):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        return torch.autograd.grad(function(x).square().sum(), [first.weight, router.w1, router.w2])

    with inductor_config.patch(force_disable_caches=True):
        found, sources = run_and_get_code(gradients, torch.compile(network, fullgraph=True))
    for ours, theirs in zip(found, gradients(network), strict=True):
        torch.testing.assert_close(ours, theirs)
    maps = {strides for source in sources for strides in re.findall(r"\(2, 6, 8, 8\), (\(\d{3}, [\d, ]+\))", source)}
    assert "fastroute.cross_connect_backward" in "".join(sources)
    assert maps == {"(384, 1, 48, 6)"}  # those of channels_last


@pytest.mark.parametrize("first, second", [("contiguous", "channels_last"), ("channels_last", "contiguous")])
def test_a_backward_takes_paths_that_a_graph_saved_in_two_layouts(first, second):
    xs, (w1, b1, w2, b2) = (
        [x.detach() for x in tensors(torch.float32, "contiguous")[0]],
        tensors(torch.float32, "contiguous")[1],
    )
    python, grads = torch.ops.fastroute_python, [torch.randn(4, 8, 6, 5) for _ in range(4)]
    _, gates, _, pooled, hidden = python.cross_connect(xs, w1, b1, w2, b2, False)
    mixed = [xs[0].contiguous(memory_format=FORMATS[first]), xs[1].contiguous(memory_format=FORMATS[second])]
    saved = (w1, b1, w2, b2, gates, pooled, hidden)
    for call in (
        lambda xs: python.cross_connect_backward(grads, None, None, xs, *saved, False, True),
        lambda xs: python.mix_backward(grads, xs, gates, True),
        lambda xs: (python.gate_backward(gates, None, xs, *saved),),
    ):
        torch.testing.assert_close(call(mixed), call(xs))
    assert {
        x.is_contiguous(memory_format=FORMATS[first]) for x in python.mix_backward(grads, mixed, gates, True)[0]
    } == {True}


@pytest.mark.parametrize("content", [b"", b"fastroute_build \xff\xfe;"])
def test_a_library_that_was_not_written_whole_is_not_loaded(tmp_path, content):
    (tmp_path / "_C.so").write_bytes(content)
    assert "_C.so" in _compiled.reason_against(tmp_path / "_C.so", ("ops",))
