"""Random inputs of the Triton kernels, and their results held to the rule."""

import dataclasses
import importlib
import importlib.util
import sys

import pytest
import torch

from fastroute import ops, use_backend
from tests.backends.triton_kernels.devices import CUDA

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
with pytest.MonkeyPatch.context() as environment:
    if not CUDA:  # Triton decides when it is imported whether it interprets
        assert "triton" not in sys.modules, "Triton was imported before it could be told to interpret"
        environment.setenv("TRITON_INTERPRET", "1")
    cc, mx, em, cp, gt, tables = (
        importlib.import_module(f"fastroute.backends.triton.{name}")
        for name in ("cross_connect", "mix", "mixture_em", "cross_predict", "gate", "planning")
    )


def force(monkeypatch, tier, **changes):
    """Have cross_connect take one tier, with some of its settings changed."""

    def plan(problem, chip):
        settings = tables.resident(problem) if tier == "resident" else getattr(tables, tier)(problem, chip)
        applicable = {field.name for field in dataclasses.fields(settings)} & changes.keys()
        return dataclasses.replace(settings, **{name: changes[name] for name in applicable})

    monkeypatch.setattr(cc, "_plan", plan)


KERNELS = {
    "resident": ["cross_connect_resident_fwd_kernel", "cross_connect_resident_bwd_kernel"],
    "fused": ["cross_connect_fused_fwd_kernel", "cross_connect_fused_bwd_kernel"],
    "split": [
        "cross_connect_pool_fwd_kernel",
        "cross_connect_gate_fwd_kernel",
        "mix_fwd_kernel",
        "mix_bwd_kernel",
        "cross_connect_gate_bwd_kernel",
        "cross_connect_inputs_bwd_kernel",
    ],
}


def make_paths(count, shape, dtype, device, layout="first"):
    if layout == "stacked":  # (N, paths, C, *S): the samples of a path are far apart
        return list(torch.randn(shape[0], count, *shape[1:], device=device).to(dtype).unbind(1))
    if layout == "sliced":  # each path with a batch stride of its own
        return [torch.randn(shape[0] * (i + 2), *shape[1:], device=device).to(dtype)[:: i + 2] for i in range(count)]
    paths = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    if layout == "last":
        paths = [x.movedim(1, -1).contiguous().movedim(-1, 1) for x in paths]
    return paths


def make_gate(m, n, channels, hidden, device, bias=True, dtype=torch.float32):
    shapes = [(m, hidden, channels), (m, hidden), (m, n, hidden or channels), (m, n)]
    w1, b1, w2, b2 = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    if not hidden:
        w1 = b1 = None
    return (w1, b1, w2, b2) if bias else (w1, None, w2, None)


def route(backend_name, xs, gate, grads, dtype=None, activation=None):
    """Outputs, gates, scores and every gradient of cross_connect, by name; in `dtype` if given."""
    convert = {} if dtype is None else {"dtype": dtype}
    xs = [x.detach().to(**convert).requires_grad_() if convert else x.detach().requires_grad_() for x in xs]
    gate = [None if p is None else p.detach().to(**convert).requires_grad_() for p in gate]
    with use_backend(backend_name):
        outputs, gates, scores = ops.cross_connect(xs, *gate, activation)
        results = [*outputs, gates, scores]
        given = [(r, g.to(r.dtype)) for r, g in zip(results, grads, strict=True) if g is not None]
        torch.autograd.backward([r for r, _ in given], [g for _, g in given])
    named = {f"y{j}": y for j, y in enumerate(outputs)} | {"gates": gates, "scores": scores}
    named |= {f"dx{i}": x.grad for i, x in enumerate(xs)}
    named |= {f"d{k}": p.grad for k, p in zip(("w1", "b1", "w2", "b2"), gate, strict=True) if p is not None}
    return {name: value.detach() for name, value in named.items()}


def largest_errors(got, exact):
    return {name: (value.double() - exact[name]).abs().max().item() for name, value in got.items()}


def assert_as_exact_as_eager(got, eager, exact, other_errors=()):
    """The error is at most twice eager's, plus a few roundings of float32.

    Eager may have been lucky: where its one error is not enough, the largest of `other_errors` counts too.
    """
    assert all(value.shape == exact[name].shape for name, value in got.items())
    errors, allowed, others = largest_errors(got, exact), largest_errors(eager, exact), iter(other_errors)
    for name, error in errors.items():
        floor = 1e-6 * (1 + exact[name].abs().max().item())
        while not error <= 2 * allowed[name] + floor:
            more = next(others, None)
            assert more is not None, f"{name}: error {error:.2e}, eager's {allowed[name]:.2e}"
            allowed = {key: max(value, more[key]) for key, value in allowed.items()}


def errors_in_other_orders(xs, gate, grads, activation, count=7):
    """Eager's errors with channels and hidden units in other orders, on which the exact result does not depend.

    Scores here are large, near 10, and their rounding determines the error of every gradient: eager's errors differ
    between orders by a factor of 5 and more.
    """
    w1, b1, w2, b2 = gate
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        channels = torch.randperm(xs[0].shape[1], generator=generator).to(xs[0].device)
        hidden = channels
        if w1 is not None:
            hidden = torch.randperm(w1.shape[1], generator=generator).to(xs[0].device)
            w1, b1 = w1[:, hidden][:, :, channels], None if b1 is None else b1[:, hidden]
        w2 = w2[:, :, hidden]
        *dys, dgates, dscores = grads
        xs, dys = ([None if t is None else t[:, channels] for t in paths] for paths in (xs, dys))
        grads = [*dys, dgates, dscores]
        results = (
            route("reference", xs, (w1, b1, w2, b2), grads, dtype, activation) for dtype in (None, torch.float64)
        )
        yield largest_errors(*results)


def check_routing(xs, gate, present=(True, True, True), activation=None):
    """Run forward and backward, compare with float64, and return the result. `present`: dY, dgates, dscores."""
    m, n = len(xs), gate[2].shape[1]
    shapes = [xs[0].shape] * n + [(xs[0].shape[0], m, n)] * 2
    given = [present[0]] * n + list(present[1:])
    grads = [
        torch.randn(shape, device=xs[0].device).to(xs[0].dtype) if g else None
        for shape, g in zip(shapes, given, strict=True)
    ]
    got = route("triton", xs, gate, grads, None, activation)
    exact, eager = (route("reference", xs, gate, grads, dtype, activation) for dtype in (torch.float64, None))
    assert_as_exact_as_eager(got, eager, exact, errors_in_other_orders(xs, gate, grads, activation))
    return got


CASES = {  # m, n, (N, C, *S), dtype, layout, hidden, bias
    "odd sizes": (2, 3, (3, 5, 7, 5), torch.float32, "first", 5, True),
    "channels_last": (3, 2, (2, 33, 7, 5), torch.bfloat16, "last", 16, True),
    "dense": (1, 2, (3, 7), torch.float32, "first", 3, True),
    "linear gate": (2, 2, (2, 6, 4, 2, 3), torch.float32, "last", 0, True),
    "stacked": (2, 2, (3, 16, 8, 8), torch.float16, "stacked", 16, True),
    "sliced": (2, 1, (2, 130, 4), torch.float32, "sliced", 4, False),
    "eight paths": (8, 8, (2, 3, 5), torch.float32, "first", 2, True),
    "rows of four": (2, 2, (2, 9, 6, 6), torch.float32, "first", 4, True),
    "flat": (2, 2, (3, 20, 7, 7), torch.bfloat16, "first", 16, True),
    "flat, full rows": (1, 3, (2, 5, 2), torch.float16, "sliced", 0, True),
}


def small_tiles(monkeypatch):
    """Every loop of the kernels that share a sample takes several steps, the last of them partial.

    There are only a few steps, since the interpreter takes a millisecond for each.
    """
    tiles, gate = tables.tiles, tables.gate

    def block_c(problem):
        return max(4, tables.triton.next_power_of_2(problem.channels) // 4)

    def small(problem):
        steps = {} if problem.layout == "flat" else {"block_s": 8, "span": 16}  # flat tiles have all positions
        return dataclasses.replace(tiles(problem), block_c=block_c(problem), num_warps=1, **steps)

    def small_gate(problem, parts):
        settings = gate(problem, parts)
        return settings | {"BC": block_c(problem), "PARTS": min(2, settings["PARTS"])}

    monkeypatch.setattr(tables, "tiles", small)
    monkeypatch.setattr(tables, "gate", small_gate)
    monkeypatch.setattr(tables, "PARTIAL_VALUES", 32)


def check_operator(function, eager, inputs, kink=False):
    """Outputs and every gradient of function(*inputs), by the rule; with `kink`, none sent beside a ReLU's."""
    exact = eager(*(None if t is None else t.double() for t in inputs))
    grads = [torch.randn(y.shape, device=y.device) for y in exact]
    if kink:
        near = 4 * torch.finfo(inputs[-1].dtype).eps
        grads = [grad * (y > near * (1 + y.max())) for grad, y in zip(grads, exact, strict=True)]

    def run(function, dtype=None):
        leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        with use_backend("triton"):
            outputs = function(*leaves)
            given = [grad.to(y.dtype) for grad, y in zip(grads, outputs, strict=True)]
            gradients = torch.autograd.grad(outputs, [leaf for leaf in leaves if leaf is not None], given)
        return {str(k): t.detach() for k, t in enumerate((*outputs, *gradients))}

    got = run(function)
    assert_as_exact_as_eager(got, run(eager), run(eager, torch.float64))
    assert all(torch.equal(again, got[name]) for name, again in run(function).items())
    return got
