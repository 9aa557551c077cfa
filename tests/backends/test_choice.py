import subprocess
import sys

import pytest
import torch

import fastroute
from fastroute import ops
from fastroute.backends import BACKENDS, _choice, native
from fastroute.backends._choice import Backend

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_choice():
    """Has the choice made anew, in Python."""
    _choice._choose.cache_clear()
    native.name_backend(True)
    yield
    native.name_backend(False)
    _choice._choose.cache_clear()


def route():
    return ops.mix([torch.ones(2, 3)], torch.ones(1, 1))


def spy(monkeypatch, name):
    """Records each operator that the backend `name` is asked for."""
    calls, backend = [], BACKENDS[name]

    class Kernels:
        def __getattr__(self, operator):
            calls.append(operator)
            return getattr(backend.kernels(), operator)

    monkeypatch.setitem(BACKENDS, name, Backend(name, backend.reason_against, Kernels))
    return calls


def test_the_fastest_that_serves_is_chosen(monkeypatch):
    if BACKENDS["native"].reason_against(CPU, torch.float32):
        pytest.skip("the compiled kernels are not built")
    calls = spy(monkeypatch, "native")
    route()
    assert calls == ["mix"]


@pytest.fixture
def python_calls(monkeypatch):
    """Counts the calls that come to Python for their backend, where the compiled kernels serve."""
    if BACKENDS["native"].reason_against(CPU, torch.float32):
        pytest.skip("the compiled kernels are not built")
    route()
    native.name_backend(False)
    calls, choose = [], _choice._choose
    monkeypatch.setattr(_choice, "_choose", lambda *key: calls.append(key) or choose(*key))
    return calls


def test_what_is_right_as_it_stands_never_comes_to_python(python_calls):
    xs = [torch.randn(2, 3, 4, requires_grad=True)]
    outputs, gates, scores = ops.cross_connect(xs, None, None, torch.randn(1, 2, 3), None)
    results = [*outputs, gates, scores, *ops.mix(xs, torch.ones(1, 1))]
    torch.autograd.backward(results, [torch.ones_like(result) for result in results])
    a, prior = torch.randn(6, 2, 3, requires_grad=True), torch.full((2, 3), 1 / 3)
    ops.mixture_em_loss(a, 5.0, prior, torch.zeros(2, 3), torch.ones(2, 3), a + 1).loss.sum().backward()
    ops.mixture_em_loss(a.bfloat16()).loss.sum().backward()
    assert not python_calls


@pytest.mark.parametrize(
    ("a", "prior"), [(torch.randn(3, 6).T, None), (torch.randn(6, 2, 3), torch.full((3,), 1 / 3))], ids=str
)
def test_scores_and_priors_that_must_be_brought_into_form_come_to_python(python_calls, a, prior):
    ops.mixture_em_loss(a, prior=prior)
    assert len(python_calls) == 1


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4, 3, 2, 5).transpose(0, 2),  # neither layout
        torch.randn(2, 3, 4, 5)[:, :, ::2],
    ],
)
def test_what_must_be_brought_into_form_comes_to_python(python_calls, x):
    ops.mix([x], torch.ones(1, 1))
    assert len(python_calls) == 1


def test_a_named_backend_comes_to_python(python_calls, monkeypatch):
    with fastroute.use_backend("reference"):
        route()
    assert len(python_calls) == 1
    route()
    assert len(python_calls) == 1
    monkeypatch.setenv("FASTROUTE_BACKEND", "reference")
    route()
    assert len(python_calls) == 2


def test_use_backend_goes_before_the_variable(monkeypatch):
    calls = spy(monkeypatch, "reference")
    monkeypatch.setenv("FASTROUTE_BACKEND", "native")
    with fastroute.use_backend("reference"):
        route()
    assert calls == ["mix"]


def test_the_variable_chooses(monkeypatch):
    calls = spy(monkeypatch, "reference")
    monkeypatch.setenv("FASTROUTE_BACKEND", "reference")
    route()
    assert calls == ["mix"]


def test_unknown_names(monkeypatch):
    with (
        pytest.raises(ValueError, match="backend is 'cudnn'; it must be one of 'triton', 'native', 'reference'"),
        fastroute.use_backend("cudnn"),
    ):
        pass
    monkeypatch.setenv("FASTROUTE_BACKEND", "cudnn")
    with pytest.raises(ValueError, match="backend is 'cudnn'"):
        route()


def test_one_that_cannot_serve_says_why(monkeypatch):
    monkeypatch.setitem(BACKENDS, "native", Backend("native", lambda device, dtype: "it rains", lambda: None))
    with (
        fastroute.use_backend("native"),
        pytest.raises(RuntimeError, match=r"'native' cannot serve .* on cpu: it rains"),
    ):
        route()


def test_the_reference_steps_in_and_says_so_once(monkeypatch):
    monkeypatch.setitem(BACKENDS, "native", Backend("native", lambda device, dtype: "it rains", lambda: None))
    with pytest.warns(UserWarning, match="plain PyTorch, which is slower .*it rains"):
        route()
    route()  # pytest's configuration makes a second warning no error, so the choice itself must be remembered
    assert _choice._choose.cache_info().hits == 1


def test_a_missing_or_foreign_library_is_a_reason(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    assert "is missing" in native._load.__wrapped__("_C")
    (tmp_path / "_C.so").write_bytes(b"no library")
    assert "does not load" in native._load.__wrapped__("_C")


@pytest.mark.parametrize("operators", ["_operators", "_cuda_operators"])
def test_a_stale_library_is_a_reason(operators, monkeypatch, tmp_path):
    reason = getattr(native, operators).__wrapped__
    if operators == "_cuda_operators":  # not so much as loaded
        monkeypatch.setattr(native, "_FOLDER", tmp_path)
        (tmp_path / "_C_cuda.so").write_bytes(b"fastroute_cuda_build of other sources")
    monkeypatch.setattr(native, "_SOURCES", tmp_path)
    assert "older than the sources" in reason()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["triton", "native"])
def test_no_device_is_a_reason(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = BACKENDS[name].reason_against(torch.device("cuda"), torch.float32)
    assert "no CUDA device" in reason or any(word in reason for word in ("missing", "not installed", "older"))


def test_import_needs_torch_alone():
    extras = ("triton", "torchvision", "pytorch_lightning", "typer")
    code = f"import sys, fastroute; print([name for name in {extras} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
