import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastroute
from fastroute import ops
from fastroute.backends import BACKENDS, _choice, _cuda, native
from fastroute.backends._choice import Backend
from fastroute.ops import _compile_form, _compiled, _library
from tests.ops.conftest import take_python

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_choice():
    """Forget earlier choices of a backend."""
    _choice._choose.cache_clear()
    _choice._set_override(None)
    yield
    _choice._choose.cache_clear()
    _choice._set_override(None)


def route():
    return ops.mix([torch.ones(2, 3)], torch.ones(1, 1))


@pytest.fixture
def in_python(monkeypatch):
    """Let Python choose the backend, as it does without compiled libraries."""
    take_python(monkeypatch)


def spy(monkeypatch, name):
    """Record each operator that is requested from the backend `name`."""
    calls, backend = [], BACKENDS[name]

    class Kernels:
        def __getattr__(self, operator):
            calls.append(operator)
            return getattr(backend.kernels(), operator)

    monkeypatch.setitem(BACKENDS, name, Backend(name, backend.reason_against, Kernels))
    return calls


def test_the_fastest_that_serves_is_chosen(monkeypatch, in_python):
    if BACKENDS["native"].reason_against(CPU, torch.float32):
        pytest.skip("the compiled kernels are not built")
    calls = spy(monkeypatch, "native")
    route()
    assert calls == ["mix"]


@pytest.fixture
def python_calls(monkeypatch):
    """Count how often Python is asked to choose a backend although the compiled kernels can serve."""
    if BACKENDS["native"].reason_against(CPU, torch.float32):
        pytest.skip("the compiled kernels are not built")
    calls, choose = [], _choice._choose
    monkeypatch.setattr(_choice, "_choose", lambda *key: calls.append(key) or choose(*key))
    return calls


def every_operator(x, scores):
    """Each of the five, forward and backward, on a path and on scores."""
    gates, w2 = torch.ones(len(x), 1, 1), torch.randn(1, 2, x.shape[1])
    weight = torch.randn(1, 1, 2, x.shape[1], *[1] * (x.dim() - 2))
    results = [*ops.cross_connect([x], None, None, w2, None).outputs, *ops.gate([x], None, None, w2, None)]
    results += [*ops.mix([x], gates), *ops.cross_predict([x], weight, None, gates)]
    results.append(ops.mixture_em_loss(scores, prior=torch.full(scores.shape[-1:], 1 / scores.shape[-1])).loss.sum())
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 3, 4),
        torch.randn(4, 3, 2, 5).transpose(0, 2),  # neither layout
        torch.randn(2, 3, 4, 5)[:, :, ::2],
    ],
    ids=["as the kernels take it", "transposed", "sliced"],
)
def test_nothing_comes_to_python_where_the_compiled_kernels_serve(python_calls, x):
    x = x.detach().requires_grad_()
    every_operator(x, torch.randn(3, 6).T.requires_grad_())
    every_operator(x, torch.randn(6, 2, 3, requires_grad=True))
    assert not python_calls


def test_the_first_call_of_a_process_takes_the_way_of_the_later_ones():
    if _library.NOT_COMPILED:
        pytest.skip(_library.NOT_COMPILED)
    code = (
        "import torch, fastroute; from fastroute.backends import _choice\n"
        "def never(*key): raise AssertionError('the call came to Python')\n"
        "_choice._choose = never\n"
        "fastroute.ops.mix([torch.ones(2, 3)], torch.ones(1, 1))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_named_backend_is_asked_for_once(python_calls, monkeypatch):
    with fastroute.use_backend("reference"):
        route()
        asked = len(python_calls)
        route()
        assert asked and len(python_calls) == asked + 1  # in Python itself, whose kernel it is
    asked = len(python_calls)
    route()
    assert len(python_calls) == asked
    monkeypatch.setenv("FASTROUTE_BACKEND", "reference")
    route()
    assert len(python_calls) > asked


def test_use_backend_goes_before_the_variable(monkeypatch):
    calls = spy(monkeypatch, "reference")
    monkeypatch.setenv("FASTROUTE_BACKEND", "native")
    with fastroute.use_backend("reference"):
        route()
    assert calls == ["mix"]


def test_use_backend_as_a_statement_stays(monkeypatch):
    calls = spy(monkeypatch, "reference")
    outer = fastroute.use_backend("reference")
    route()
    with fastroute.use_backend("native"):
        route()
    route()
    fastroute.use_backend(None)
    route()
    with outer:  # which keeps what was named before it
        pass
    assert calls == ["mix"] * 2 and _choice._override is None


def test_use_backend_as_a_decorator_and_more_than_once(monkeypatch):
    calls = spy(monkeypatch, "reference")
    decorated = fastroute.use_backend("reference")(route)
    route()
    for _ in range(2):
        decorated()
    context = fastroute.use_backend("reference")
    with context:
        route()
    route()
    with context:
        route()
    assert calls == ["mix"] * 4 and _choice._override is None


def test_use_backend_restores_what_was_set_before_each_call_and_block():
    @fastroute.use_backend("reference")
    def inner(depth=0):
        if depth:
            inner(depth - 1)
        return _choice._override

    assert _choice._override is None and inner(2) == "reference" and _choice._override is None
    with fastroute.use_backend("native"):
        inner()
        assert _choice._override == "native"
    again = fastroute.use_backend("reference")
    with again:
        with again:
            pass
        assert _choice._override == "reference"
    assert _choice._override is None
    fastroute.use_backend("native")
    with again:
        assert _choice._override == "reference"
    assert _choice._override == "native"
    fastroute.use_backend(None)
    form = fastroute.compile_form("fused")
    with form, form:
        pass
    assert _compile_form._form == "auto"


def test_the_variable_chooses(monkeypatch):
    calls = spy(monkeypatch, "reference")
    monkeypatch.setenv("FASTROUTE_BACKEND", "reference")
    route()
    assert calls == ["mix"]


def test_unknown_names(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cudnn'; it must be one of 'triton', 'native', 'reference'"):
        fastroute.use_backend("cudnn")
    monkeypatch.setenv("FASTROUTE_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="backend is 'cudnn'"):
        route()


def test_one_that_cannot_serve_says_why(monkeypatch, in_python):
    monkeypatch.setitem(BACKENDS, "native", Backend("native", lambda device, dtype: "it rains", lambda: None))
    with (
        fastroute.use_backend("native"),
        pytest.raises(RuntimeError, match=r"'native' cannot serve .* on cpu: it rains"),
    ):
        route()


def test_the_reference_steps_in_and_says_so_once(monkeypatch, in_python):
    monkeypatch.setitem(BACKENDS, "native", Backend("native", lambda device, dtype: "it rains", lambda: None))
    with pytest.warns(UserWarning, match="plain PyTorch, which is slower .*it rains"):
        route()
    route()  # pytest's configuration makes a second warning no error, so the choice itself must be remembered
    assert _choice._choose.cache_info().hits == 1


def mark(built_from="0123456789abcdef", built_for=torch.__version__):
    return f"code fastroute_build {built_from} torch {built_for}; code; code".encode()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "is missing"),
        (b"no library", "is not one of fastroute's"),
        (mark(built_for="2.0.0"), f"was built for torch 2.0.0, and this is {torch.__version__}"),
        (mark(), "is older than the sources"),
    ],
    ids=["missing", "foreign", "another torch", "stale"],
)
def test_a_library_that_does_not_fit_is_a_reason(content, reason, tmp_path, monkeypatch):
    path = tmp_path / "_C.so"
    if content is not None:
        path.write_bytes(content)
    assert reason in _compiled.reason_against(path, _compiled.OPERATORS)
    monkeypatch.setattr(_compiled, "FOLDER", tmp_path)
    assert reason in _compiled.load.__wrapped__("_C", _compiled.OPERATORS)


def test_a_library_that_does_not_load_is_a_reason(tmp_path, monkeypatch):
    from fastroute.ops._source_hash import source_hash

    (tmp_path / "_C.so").write_bytes(mark(source_hash(_compiled.ROOT, *_compiled.OPERATORS)))
    monkeypatch.setattr(_compiled, "FOLDER", tmp_path)
    assert "does not load" in _compiled.load.__wrapped__("_C", _compiled.OPERATORS)


def test_everything_works_where_nothing_is_compiled():
    """In a process that loads no library: Python defines the operators, differentiates and computes."""
    code = """
import torch, fastroute
from fastroute.ops import _library
assert "FASTROUTE_COMPILED=0" in _library.NOT_COMPILED
x = torch.randn(2, 3, 4, 4, requires_grad=True)
router = fastroute.nn.CrossConnection(3, 2, 2)
sum(y.square().sum() for y in router([x, x.detach()])).backward()
assert x.grad is not None and all(p.grad is not None for p in router.parameters())
torch.compile(router, backend="aot_eager", fullgraph=True)([x, x])
"""
    environment = os.environ | {"FASTROUTE_COMPILED": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_schemas_are_read_whole():
    text = (_compiled.ROOT / "fastroute/ops/schemas.inc").read_text()
    schemas = _library.schemas()
    assert len(schemas) == text.count("FASTROUTE_OPERATOR(") == len(_library.OPERATORS)
    for schema in schemas:
        defined = getattr(torch.ops.fastroute, schema.partition("(")[0]).default._schema
        assert torch._C.parse_schema(f"fastroute::{schema}") == defined


def machine(monkeypatch, devices, capability=(9, 0), driver=None):
    """Have torch.cuda tell of this machine."""

    def init():
        if driver:
            raise RuntimeError(driver)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    for name, function in {
        "init": init,
        "is_available": lambda: devices > 0,
        "device_count": lambda: devices,
        "get_device_capability": lambda device: capability,
        # consumer GPUs with clusters have less shared memory
        "get_device_properties": lambda device: SimpleNamespace(
            shared_memory_per_block_optin=(99 if capability >= (12, 0) else 227) << 10
        ),
    }.items():
        monkeypatch.setattr(torch.cuda, name, function)


@pytest.mark.parametrize(
    ("settings", "device", "reason"),
    [
        ({"devices": 1}, "cuda:0", None),
        ({"devices": 1}, "cuda:3", "cuda:3 is asked for, and this machine has 1 CUDA device"),
        ({"devices": 1, "capability": (7, 5)}, "cuda:0", "need compute capability 8.0, and cuda:0 has 7.5"),
        (
            {"devices": 0, "driver": "The driver is too old (version 12040). Please"},
            "cuda",
            "too old (version 12040)",
        ),
        ({"devices": 0}, "cuda", "this machine has no CUDA device"),
    ],
)
def test_what_a_gpu_lacks_is_a_reason(settings, device, reason, monkeypatch):
    machine(monkeypatch, **settings)
    found = _cuda.reason_against_device(torch.device(device), (8, 0))
    assert found is None if reason is None else reason in found


NATIVE, TRITON, CLUSTERS = _choice._NATIVE, _choice._TRITON, _choice._CLUSTERS


@pytest.mark.parametrize(
    ("capability", "absent", "named", "flags"),
    [
        ((9, 0), (), None, NATIVE | TRITON | CLUSTERS),
        ((10, 0), (), None, NATIVE | TRITON | CLUSTERS),
        ((10, 3), (), None, NATIVE | TRITON),  # of what is compiled, only PTX of sm_80 runs there, without clusters
        ((8, 9), (), None, NATIVE | TRITON),  # no clusters: Triton is first at any size
        ((12, 0), (), None, NATIVE | TRITON),  # clusters with too little shared memory
        ((9, 0), ("native",), None, TRITON),
        ((9, 0), ("triton",), None, NATIVE | CLUSTERS),
        ((9, 0), ("triton", "native"), None, 0),  # neither: the compiled library asks Python, for the reference
        ((9, 0), (), "native", NATIVE | CLUSTERS),
        ((9, 0), (), "triton", TRITON),
        ((9, 0), (), "reference", 0),
    ],
)
@pytest.mark.filterwarnings("ignore:fastroute computes")
def test_what_the_compiled_library_is_told_of_a_gpu(monkeypatch, capability, absent, named, flags):
    machine(monkeypatch, 1, capability)
    for name in ("native", "triton"):
        reason = "it rains" if name in absent else None
        monkeypatch.setitem(BACKENDS, name, Backend(name, lambda device, dtype, reason=reason: reason, lambda: None))
    monkeypatch.setattr(_compiled, "cuda_architectures", lambda: ("compute_80", "sm_90", "sm_100a", "compute_120"))
    like = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float32)
    if named:
        monkeypatch.setenv("FASTROUTE_BACKEND", named)
    assert _choice._serving_flags(like) == flags


@pytest.mark.parametrize(
    ("built_for", "capability", "serves"),
    [
        ("sm_90", (9, 0), True),
        ("sm_90", (8, 0), False),
        ("sm_90", (10, 0), False),  # machine code is of one major version
        ("sm_80", (8, 9), True),
        ("sm_89", (8, 6), False),
        ("sm_80,sm_90,sm_100", (12, 0), False),
        ("sm_80,sm_90,sm_100,compute_100", (12, 0), True),  # the driver compiles PTX
        ("sm_100,compute_100", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a,compute_100a", (10, 3), False),
    ],
)
def test_kernels_serve_the_cards_that_they_are_compiled_for(monkeypatch, tmp_path, built_for, capability, serves):
    machine(monkeypatch, 1, capability)
    (tmp_path / "_C_cuda.so").write_bytes(mark(built_for=f"{torch.__version__} for {built_for}"))
    monkeypatch.setattr(_compiled, "FOLDER", tmp_path)
    monkeypatch.setattr(_compiled, "load_cuda", lambda: None)
    monkeypatch.setattr(_compiled, "cuda_architectures", _compiled.cuda_architectures.__wrapped__)
    reason = native.reason_against(torch.device("cuda:0"), torch.float32)
    major, minor = capability
    assert reason == (
        None
        if serves
        else f"the CUDA kernels are compiled for {built_for.replace(',', ', ')}, and cuda:0 is sm_{major}{minor}; "
        f"rebuild them with `TORCH_CUDA_ARCH_LIST={major}.{minor} python setup.py build_ext --inplace`"
    )


def test_a_built_library_says_what_it_is_compiled_for():
    if reason := _compiled.load_cuda():
        pytest.skip(reason)
    assert all(re.fullmatch(r"(sm|compute)_\d+[a-z]?", name) for name in _compiled.cuda_architectures())


KIB = 1 << 10


@pytest.mark.parametrize(
    ("native", "case"),
    [
        # What is needed twice fits in registers: 128 KiB of X, or of dY in the backward.
        (False, {"path": 64 * KIB}),
        (True, {"path": 64 * KIB + 16}),
        (False, {"path": 128 * KIB, "m": 1}),
        (True, {"path": 128 * KIB + 16, "m": 1}),
        (False, {"path": 64 * KIB, "n": 3}),
        (True, {"path": 64 * KIB, "n": 3, "backward": True}),
        (False, {"path": 64 * KIB, "m": 3, "backward": True}),
        # The backward of more than 264 samples: 64 KiB.
        (False, {"path": 64 * KIB, "samples": 264, "backward": True}),
        (True, {"path": 64 * KIB, "samples": 265, "backward": True}),
        (False, {"path": 32 * KIB, "samples": 265, "backward": True}),
        (True, {"path": 32 * KIB + 16, "samples": 265, "backward": True}),
        (False, {"path": 64 * KIB, "samples": 265}),
        # A cluster holds them: eight blocks of 227 KB, less sums and gates.
        (True, {"path": 64 * 56 * 56 * 4, "samples": 256}),
        (True, {"path": 64 * 56 * 56 * 4, "samples": 256, "backward": True}),
        (False, {"path": 64 * 56 * 56 * 4, "samples": 256, "m": 3}),
        (True, {"path": 64 * 56 * 56 * 4, "samples": 256, "m": 3, "backward": True}),
        (True, {"path": 64 * 56 * 56 * 4, "samples": 256, "m": 6, "backward": True}),
        (False, {"path": 64 * 56 * 56 * 4, "samples": 256, "m": 6, "backward": True, "relu": True}),
        (False, {"path": 64 * 56 * 56 * 4, "samples": 256, "n": 3, "backward": True}),
        (False, {"path": 64 * KIB + 8, "channels": 2}),  # no whole number of 16-byte vectors
        (False, {"path": 64 * KIB + 16, "element_bytes": 8}),
        # Each block of a cluster reads all of W1.
        (True, {"path": 1016 * 98 * 2, "channels": 1016, "element_bytes": 2, "samples": 256}),
        (False, {"path": 1024 * 98 * 2, "channels": 1024, "element_bytes": 2, "samples": 256}),
        (False, {"path": 64 * KIB + 16, "samples": 0}),
    ],
    ids=str,
)
def test_which_of_native_and_triton_is_first(native, case):
    """At the edges of each row of the table in csrc/ops/problem_sizes.h; `path` is the bytes of one path's sample."""
    if _library.NOT_COMPILED:
        pytest.skip(_library.NOT_COMPILED)
    case = {"samples": 128, "channels": 4, "element_bytes": 4, "m": 2, "n": 2, "relu": False, "backward": False} | case
    space = case.pop("path") // (case["channels"] * case["element_bytes"])
    prefers = torch.ops.fastroute_native.cuda_prefers_native
    assert prefers(**case, space=space, channels_last=False, hidden=16) is native


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["triton", "native"])
def test_no_device_is_a_reason(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = BACKENDS[name].reason_against(torch.device("cuda"), torch.float32)
    assert any(word in reason for word in ("CUDA device", "missing", "not installed", "older"))


def test_import_needs_torch_alone():
    extras = ("triton", "torchvision", "pytorch_lightning", "typer")
    code = f"import sys, fastroute; print([name for name in {extras} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_answer_from_before_another_backend_was_named_is_not_kept(monkeypatch):
    if _library.NOT_COMPILED:
        pytest.skip(_library.NOT_COMPILED)
    asked, choose = [], _choice._choose

    def slow(*args):
        if sys._getframe(1).f_code.co_name == "_serving_flags":  # asked by the compiled library
            asked.append(args)
            if len(asked) == 1:
                torch.ops.fastroute_native.name_backend("reference")  # as another thread may meanwhile
        return choose(*args)

    monkeypatch.setattr(_choice, "_choose", slow)
    with fastroute.use_backend("reference"):
        for _ in range(3):
            ops.mix([torch.ones(2, 3)], torch.ones(2, 1, 1))
    assert len(asked) == 2
