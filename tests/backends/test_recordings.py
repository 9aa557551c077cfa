"""Launches of Triton's kernels by the compiled library are those that Python makes, on a driver without a card."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import stub_driver
from fastroute import use_backend
from fastroute.backends import BACKENDS
from fastroute.backends.triton import _recording
from fastroute.ops import _library
from tests.backends.recorded_launches import CASES, calls

OPERATORS = {"cross_connect", "gate", "mix", "mixture"}


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if _library.NOT_COMPILED:
        pytest.skip(_library.NOT_COMPILED)
    environment = stub_driver.environment(tmp_path_factory.mktemp("stub"))
    program = Path(__file__).with_name("recorded_launches.py")
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows(printed):
    return printed[:-1]


def test_arguments_at_one_address_are_a_case_of_their_own(printed):
    assert printed[-1]["aliased first"] == [True, True, False, False]


def test_a_call_that_failed_is_recorded_at_the_next_try(printed):
    assert printed[-1]["failed first"] == [True, False]


def test_a_replay_launches_what_python_did(rows):
    assert {name for _, name, *_ in rows} == OPERATORS
    for case, name, (first, _), (again, _) in rows:
        assert all(part["launches"] for part in first), (case, name)
        assert again == first, (case, name)


def test_only_the_first_call_comes_to_python(rows):
    for case, name, (_, recorded), (_, replayed) in rows:
        assert len(recorded) == 2, (case, name, recorded)  # forward and backward
        assert replayed == [], (case, name, replayed)


def test_every_tier_is_among_the_cases(rows):
    launches = {case: len(first[0]["launches"]) for case, name, (first, _), _ in rows if name == "cross_connect"}
    assert launches["resident"] == launches["fused"] < launches["split"]


def recorded(function, *args):
    """The code of a call without launches, and why there is none."""
    recorder = _recording._Recorder(args)
    with recorder:
        results = function(*args)
    return recorder.code(results), recorder.obstacle


def test_a_call_that_allocates_and_launches_alone_is_recorded():
    x = torch.randn(3, 4)
    code, obstacle = recorded(lambda x: [torch.empty_like(x.float().contiguous()), x.new_empty(2)], x)
    float32 = 6
    assert obstacle is None
    assert code == [2, float32, 2, 3, 4, 2, 4, 1, float32, 1, 2, 1, 1, 1, 2, 1, 2, 0]


@pytest.mark.parametrize(
    ("function", "obstacle"),
    [
        (lambda x: x.new_empty(3).zero_(), "zero_"),
        (lambda x: x.new_empty(3) + 1, "add"),
        (lambda x: torch.empty_like(x.half().float()), "to.dtype|_to_copy"),
        (lambda x: torch.empty_like(x.T.contiguous()), "is called in addition to"),
        (lambda x: x, "not allocated in the call"),
    ],
    ids=["in-place", "computed", "converted", "copied", "an argument"],
)
def test_any_other_call_is_left_to_python(function, obstacle):
    code, reason = recorded(function, torch.randn(3, 4))
    assert code is None
    assert re.search(obstacle, reason)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_replay_computes_what_python_did(case, monkeypatch):
    if reason := BACKENDS["triton"].reason_against(torch.device("cuda"), torch.float32) or _library.NOT_COMPILED:
        pytest.skip(reason)
    by_name, _ = calls(*CASES[case], device="cuda")
    kernels = BACKENDS["triton"].kernels()
    record, recorded = kernels.record, []
    monkeypatch.setattr(kernels, "record", lambda function, args: recorded.append(function) or record(function, args))
    torch.ops.fastroute_native.forget_recordings()
    with use_backend("triton"):
        for name, (forward, backward) in by_name.items():
            recorded.clear()
            turns = []
            for _ in range(3):
                results = forward()
                turns.append([*results, *backward(results)])
            assert len(recorded) == 2, name
            for again in turns[1:]:
                assert all(torch.equal(a, b) for a, b in zip(turns[0], again, strict=True)), name
