import copy

import pytest
import torch
from torch import nn

from fastroute.nn import GateClusteringLoss, SparseRouter, set_gate_norm
from fastroute.ops import mixture_em_loss
from tests.nn.sparse.routers import clustered, convs, spread


@pytest.mark.parametrize("top_k", [1, 2])
def test_clustered_routing_chooses_by_posteriors(top_k):
    router, x = clustered(top_k), 2 * torch.randn(64, 6, 4, 4) + 1
    router.gate_norm.prior.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    prior = router.gate_norm.prior.clone()
    hidden = torch.relu(x.mean((2, 3)) @ router.w1.T + router.b1) @ router.w2.T + router.b2
    normalized = (hidden - hidden.mean(0)) / hidden.std(0, correction=0)
    posterior = (normalized + prior.log()).softmax(1)
    _, routing = router(x, return_routing=True)
    torch.testing.assert_close(routing.scores, normalized, rtol=1e-3, atol=1e-4)
    assert torch.equal(routing.chosen, posterior.topk(top_k).indices)
    assert torch.equal(routing.prior, prior)
    torch.testing.assert_close(router.gate_norm.prior, posterior.mean(0), rtol=1e-3, atol=1e-4)


def test_the_clustering_loss_takes_the_routers_priors():
    router, x = clustered(), torch.randn(64, 6, 4, 4)
    router.gate_norm.prior.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    _, routing = router(x, return_routing=True)
    criterion = GateClusteringLoss()
    loss = criterion({"router": routing})
    expected, _ = mixture_em_loss(routing.scores, 5.0, torch.tensor([0.1, 0.2, 0.3, 0.4]))
    torch.testing.assert_close(loss, expected)
    assert not criterion.priors
    even, _ = mixture_em_loss(routing.scores)
    torch.testing.assert_close(GateClusteringLoss(prior_momentum=None)({"router": routing}), even)
    loss.backward()
    assert router.w1.grad.abs().max() > 0


def test_clustered_paths_start_with_even_shares():
    torch.manual_seed(0)
    x = torch.randn(512, 6, 4, 4) + 3  # far from the scores' zero
    even, uneven = (SparseRouter(6, 4, routing=routing).divide(x)[1].load for routing in ("cluster", "topk"))
    assert even.min() > 64 and uneven.max() > 256


def test_a_path_with_a_prior_of_zero_gets_no_sample():
    router, x = clustered(2), torch.randn(64, 6, 4, 4)
    router.gate_norm.prior.copy_(torch.tensor([0.5, 0.0, 0.25, 0.25]))
    y, routing = router(x, return_routing=True)
    assert routing.load[1] == 0 and y.isfinite().all()
    assert GateClusteringLoss()({"router": routing}).isfinite()


def test_constant_scores_are_a_choice_by_priors():
    router, x = clustered(), torch.randn(16, 6, 4, 4)
    nn.init.zeros_(router.w2)
    router.gate_norm.prior.copy_(torch.tensor([0.1, 0.2, 0.4, 0.3]))
    y, routing = router(x, return_routing=True)
    assert routing.load.tolist() == [0, 0, 16, 0] and not routing.scores.any()
    (y.sum() + GateClusteringLoss()({"router": routing})).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in router.parameters())


def test_a_batch_of_one_needs_running_statistics():
    router = clustered()
    with pytest.raises(ValueError, match="scores have 1 samples; in training mode gate_norm='standardize' needs at"):
        router(torch.randn(1, 6, 4, 4))
    assert router.eval()(torch.randn(1, 6, 4, 4)).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"routing": "cluster"}])
def test_nan_spoils_its_own_sample_and_no_statistics(options):
    torch.manual_seed(0)
    router, x = spread(SparseRouter(6, convs(4), 2, **options)), torch.randn(16, 6, 4, 4)
    router(x)
    x[3] = torch.nan
    y, routing = router.eval()(x, return_routing=True)
    assert not y[3].isfinite().any() and y[torch.arange(16) != 3].isfinite().all() and routing.load.sum() == 32
    router.train()(x)
    assert all(value.isfinite().all() for value in router.state_dict().values())


def test_clustered_routing_under_compile_with_a_capacity():
    router = clustered(2, capacity_factor=0.7)
    eager, x = copy.deepcopy(router), torch.randn(32, 6, 4, 4)
    compiled = torch.compile(router, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(router.state_dict(), eager.state_dict())


@pytest.mark.parametrize("options", [{}, {"routing": "cluster"}])
def test_exports_in_evaluation_mode(options):
    torch.manual_seed(0)
    router = spread(SparseRouter(6, [nn.Sequential(*convs(1), nn.BatchNorm2d(5)) for _ in range(3)], 2, **options))
    router(torch.randn(16, 6, 4, 4))
    router.eval()
    x = torch.randn(4, 6, 4, 4)
    exported = torch.export.export(router, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.randn(9, 6, 4, 4)
    torch.testing.assert_close(exported.module()(x), router(x))
    routed = torch.export.export(router, (x,), {"return_routing": True})
    assert not [node for node in routed.graph.nodes if "snapshot" in str(node.target)]  # of training alone
    traced = torch.jit.trace(router, x[:2])
    torch.testing.assert_close(traced(x), router(x))


def test_the_normalisation_of_clustered_routing_is_its_own():
    router = clustered()
    set_gate_norm(router, None)
    assert (router.gate_norm.kind, router.gate_norm.prior is not None) == ("standardize", True)
    set_gate_norm(router, "center")
    assert (router.gate_norm.kind, router.gate_norm.prior is not None) == ("center", True)
    other = clustered()
    other.load_state_dict(router.state_dict())
    with pytest.raises(RuntimeError, match=r"gate_norm\.running_mean"):
        other.load_state_dict(SparseRouter(6, convs(4)).state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_router_in_another_type_trains_with_its_loss(dtype):
    torch.manual_seed(0)
    router = SparseRouter(8, [torch.nn.Identity() for _ in range(3)], routing="cluster").to(dtype)
    for _ in range(2):
        y, routing = router(torch.randn(16, 8, dtype=dtype), return_routing=True)
        loss = GateClusteringLoss()({"router": routing})
        (y.float().square().mean() + loss).backward()
        assert routing.prior.dtype == routing.scores.dtype and routing.prior.sum().item() == pytest.approx(1, abs=1e-6)
    assert router.w2.grad.isfinite().all() and router.w2.grad.abs().sum() > 0


def test_a_reset_makes_priors_even_and_forgets_the_statistics():
    used, fresh = (SparseRouter(6, 4, routing="cluster") for _ in range(2))
    spread(used).divide(torch.randn(64, 6, 4, 4))
    assert not used.gate_norm.prior.equal(fresh.gate_norm.prior)
    used.reset_parameters()
    assert all(a.equal(b) for a, b in zip(used.buffers(), fresh.buffers(), strict=True))
