"""Check that the tests of this folder notice one wrong sign in one gradient, computed through C++ or through Python."""

import sys

import pytest
import torch
from torch.utils import _pytree as pytree

from fastroute import use_backend
from fastroute.backends import BACKENDS
from tests.ops import mixture_cases, test_cross_connect, test_cross_predict, test_gate, test_mix
from tests.ops.cases import check_against_eager, parameters, paths
from tests.ops.conftest import take_python

XS, GATE = paths(2, (3, 4, 5, 5)), parameters(2, 2, 4)
CHECKS = {
    "cross_connect": lambda: test_cross_connect.check(XS, GATE),
    "gate": lambda: check_against_eager(test_gate.gated, test_gate.eager, [*GATE, *XS]),
    "mix": lambda: check_against_eager(test_mix.mixed, test_mix.eager, [torch.rand(3, 2, 2), *XS]),
    "cross_predict": lambda: test_cross_predict.check(XS, test_cross_predict.parameters(2, 2, 5, 4, (3, 3), 3)),
    "mixture_em_loss": lambda: mixture_cases.check(mixture_cases.make_case((6, 4), augmented=True)),
}


def wrong(function, position, seen):
    """Return the function with the sign of one result flipped; `seen` receives the number of results."""

    def run(*args):
        leaves, structure = pytree.tree_flatten(function(*args))
        gradients = [k for k, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        seen.add(len(gradients))
        leaves[gradients[position]] = -leaves[gradients[position]]
        return pytree.tree_unflatten(leaves, structure)

    return run


def check_sees_wrong_signs(monkeypatch, check, owner, name, wrapped=lambda function: function):
    check()
    right, seen, position = getattr(owner, name), {1}, 0
    while position < max(seen):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, wrapped(wrong(right, position, seen)))
            with pytest.raises(AssertionError, match="is off by"):
                check()
        position += 1
    assert position == max(seen) >= 2
    check()


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_gradients_that_cpp_hands_on(name, monkeypatch, native_library):
    """C++ differentiates and asks for the backward, which is the specification's here."""
    with use_backend("reference"):
        kernels = BACKENDS["reference"].kernels()
        check_sees_wrong_signs(monkeypatch, CHECKS[name], kernels, f"{name}_backward")


CLASSES = {name: "_" + name.title().replace("_", "") for name in CHECKS} | {"mixture_em_loss": "_MixtureEMLoss"}


@pytest.mark.parametrize("name", CHECKS)
def test_in_the_gradients_of_python(name, monkeypatch):
    take_python(monkeypatch)
    function = getattr(sys.modules[f"fastroute.ops.{name.removesuffix('_loss')}"], CLASSES[name])
    check_sees_wrong_signs(monkeypatch, CHECKS[name], function, "backward", staticmethod)
