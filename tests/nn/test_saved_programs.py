"""Programs of `torch.export` that return named tuples can be saved."""

import pytest
import torch
from torch import nn

from fastroute.models import create_model
from fastroute.nn import CrossPredictionLinear, MixtureEMLoss, RelevanceNorm, SparseRouter
from fastroute.ops import cross_connect, gate


class Operators(nn.Module):
    def forward(self, x, w2):
        return cross_connect([x, x], None, None, w2, None), gate([x, x], None, None, w2, None)


PROGRAMS = {
    "routing": (lambda: create_model("resnet20_cc2"), [(2, 3, 32, 32)], {"return_routing": True}),
    "sparse routing": (lambda: SparseRouter(4, [nn.Conv2d(4, 4, 1)] * 2, 1), [(2, 4, 5, 5)], {"return_routing": True}),
    "loss": (lambda: MixtureEMLoss(norm=RelevanceNorm(4)), [(8, 4)], {}),
    "operators": (Operators, [(2, 4, 5, 5), (2, 2, 4)], {}),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_saved_program_returns_named_tuples(name, tmp_path):
    build, shapes, options = PROGRAMS[name]
    torch.manual_seed(0)
    module, xs = build().eval(), tuple(torch.randn(shape) for shape in shapes)
    torch.export.save(torch.export.export(module, xs, options), tmp_path / "program.pt2")
    given, wanted = torch.export.load(tmp_path / "program.pt2").module()(*xs, **options), module(*xs, **options)
    torch.testing.assert_close(given, wanted)
    assert repr(given) == repr(wanted)  # with the names of their types and fields


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = CrossPredictionLinear(8, 6, in_paths=2, out_paths=2)

    def forward(self, a, b):
        return self.router([a, b])


def test_programs_run_compiled_ahead_of_time(tmp_path):
    """Where dense layers pass empty lists of strides to the operator, whose runtime takes those for None."""
    torch.manual_seed(0)
    module, xs = Linear().eval(), (torch.randn(4, 8), torch.randn(4, 8))
    program = torch.export.export(module, xs)
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "program.pt2"))
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(*xs), module(*xs))
