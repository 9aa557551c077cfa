"""Operators, layers and conversions on random, odd and hostile input, each case in a process of its own."""

import os
import subprocess
import sys

import pytest


def attack(module: str, seed: int, count: int, **environment: str) -> None:
    """Raise unless all of a module's random cases pass."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.attack.{module}", str(seed), str(count)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0 and f"{count} of {count} passed" in done.stdout, done.stdout + done.stderr[-2000:]


SEEDS = "seed {}".format


@pytest.mark.parametrize("kernels", ["", "avx2"], ids=lambda name: name or "the processor's own")
@pytest.mark.parametrize("seed", range(4), ids=SEEDS)
def test_geometries_of_cross_prediction(seed, kernels):
    attack("geometries", seed, 500, FASTROUTE_CPU=kernels)


@pytest.mark.parametrize("seed", range(2), ids=SEEDS)
def test_every_operator(seed):
    attack("operators", seed, 500)


@pytest.mark.parametrize(
    "name, value", [("FASTROUTE_CPU", "avx2"), ("FASTROUTE_COMPILED", "0")], ids=["avx2", "no compiled kernels"]
)
def test_every_operator_by_other_kernels(name, value):
    attack("operators", 2, 300, **{name: value})


@pytest.mark.parametrize("seed", range(2), ids=SEEDS)
def test_networks_made_multi_path(seed):
    attack("conversions", seed, 500)


def test_hostile_arguments_of_private_operators():
    attack("private", 0, 1000)
