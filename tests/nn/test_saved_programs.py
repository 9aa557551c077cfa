"""Programs of `torch.export` that return named tuples can be saved."""

import pytest
import torch
from torch import nn

from fastroute.models import create_model
from fastroute.nn import MixtureEMLoss, RelevanceNorm, SparseRouter
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
