"""Compiled training steps of modules that update what they read: the gradients of later steps are as eager's.

PyTorch's compiler may compute a buffer's uses again in the backward, after the update; Inductor is what does so.
"""

import copy

import pytest
import torch
from torch import nn

import fastroute
from fastroute.nn import (
    CrossConnection,
    GateClusteringLoss,
    GateNorm,
    MixtureEMLoss,
    RelevanceNorm,
    Routing,
    SparseRouter,
)

STEPS = 3


class Clustering(nn.Module):
    """A layer's scores and a loss of them."""

    def __init__(self, criterion):
        super().__init__()
        self.scores, self.criterion = nn.Linear(6, 4), criterion

    def forward(self, x):
        return self.criterion(self.scores(x))


class GateClustering(GateClusteringLoss):
    def forward(self, scores):
        scores = torch.stack([scores, scores.square()], 1)
        return super().forward({"router": Routing(scores.softmax(-1), scores)})


class MixtureEM(MixtureEMLoss):
    def forward(self, scores):
        return super().forward(scores)[0]


class Normalized(RelevanceNorm):
    def forward(self, scores):
        return super().forward(scores).softmax(-1)[:, 0].square().sum()


class Router(nn.Module):
    """A router and the loss of its gates."""

    def __init__(self, router, **options):
        super().__init__()
        self.router, self.criterion = router, GateClusteringLoss(gamma=2, prior_momentum=0.8, **options)
        for parameter in router.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x):
        x = x.unflatten(0, (-1, 2)).unbind(1)
        xs, routing = self.router(list(x) if isinstance(self.router, CrossConnection) else x[0], return_routing=True)
        return self.criterion({"router": routing}) + sum(x.square().sum() for x in xs) / 50


def build(name):
    if name == "gate clustering":
        return Clustering(GateClustering(gamma=2, prior_momentum=0.8))
    if name == "mixture-EM":
        return Clustering(MixtureEM(gamma=2, norm=RelevanceNorm(4, momentum=0.8)))
    if name == "relevance norm":
        return Clustering(Normalized(4, momentum=0.8))
    if name == "sparse":
        return Router(SparseRouter(6, [nn.Linear(6, 5) for _ in range(3)], 2, routing="cluster"))
    router = CrossConnection(6, 2, 3, gate_norm=name, prior="learned")
    router.gate_norm.momentum = 0.8
    return Router(router)


@pytest.mark.parametrize("form", ["auto", "fused", "operator"])
@pytest.mark.parametrize("name", ["gate clustering", "mixture-EM", "relevance norm", "center", "standardize", "sparse"])
def test_gradients_of_later_steps(name, form):
    torch.manual_seed(0)
    module = build(name)
    eager = copy.deepcopy(module).double()
    torch._dynamo.reset()
    with fastroute.compile_form(form):
        compiled = torch.compile(module)
        for step in range(STEPS):
            x = torch.randn(64, 6) ** 2 + step
            compiled(x).backward()
            eager(x.double()).backward()
            given, wanted = (nn.utils.parameters_to_vector(p.grad for p in m.parameters()) for m in (module, eager))
            assert (given - wanted).abs().max() < 1e-5 * wanted.abs().max(), step
            module.zero_grad()
            eager.zero_grad()
            with torch.no_grad():  # the same weights in both
                for parameter, exact in zip(module.parameters(), eager.parameters(), strict=True):
                    exact.copy_(parameter.add_(0.01))


@pytest.mark.parametrize("kind", ["center", "standardize"])
def test_statistics_compile_in_float64(kind):
    norm, scores = GateNorm(kind, None, 4).double(), torch.randn(64, 4, dtype=torch.float64)
    torch._dynamo.reset()
    found = torch.compile(norm)(scores)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, copy.deepcopy(norm)(scores), rtol=1e-12, atol=1e-12)


def test_constant_scores_compile_to_zero():
    scores = torch.randn(60, 4)
    scores[:, 1] = 3.3
    torch._dynamo.reset()
    found = torch.compile(GateNorm("standardize", None, 4))(scores)
    assert torch.equal(found[:, 1], torch.zeros(60)) and found[:, 0].std() > 0.9
