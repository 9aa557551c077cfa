import math

import pytest
import torch
import torch.distributed as dist
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

from fastroute.nn import CrossConnection, GateClusteringLoss, Routing, SparseRouter, SparseRouting
from fastroute.ops import mixture_em_loss


def scores(*shape, skew=0.0, seed=0):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    drawn[..., 0] += skew
    return drawn.requires_grad_()


def routing(*tensors):
    return {f"router{i}": Routing(t.softmax(-1), t) for i, t in enumerate(tensors)}


def test_the_losses_of_all_gating_vectors_are_added():
    a, b = scores(16, 2, 3), scores(16, 1, 2, seed=1)
    loss = GateClusteringLoss(prior_momentum=None)(routing(a, b))
    vectors = [a[:, 0], a[:, 1], b[:, 0]]
    torch.testing.assert_close(loss, torch.stack([mixture_em_loss(v).loss for v in vectors]).sum())


def test_a_single_outgoing_path_is_not_clustered():
    criterion, a = GateClusteringLoss(), scores(16, 2, 3)
    with_one = criterion(routing(a, scores(16, 2, 1)))
    torch.testing.assert_close(with_one, GateClusteringLoss()(routing(a)))
    for nothing in ({}, routing(scores(16, 2, 1))):
        with pytest.raises(ValueError, match=f"routing has {len(nothing)} routers; it must have at least one"):
            criterion(nothing)


def test_priors_follow_the_posteriors_of_the_steps_before():
    criterion, a = GateClusteringLoss(prior_momentum=0.25), scores(64, 1, 2).detach()
    a[:40, 0, 0] += 4.0  # two groups of uneven size
    posterior = mixture_em_loss(a, prior=torch.full((1, 2), 0.5)).posterior
    first = criterion(routing(a))
    expected = 0.75 * 0.5 + 0.25 * posterior.mean(0)
    torch.testing.assert_close(criterion.priors["router0"], expected)
    torch.testing.assert_close(criterion(routing(a)), mixture_em_loss(a, prior=expected).loss.sum())
    assert criterion(routing(a)) != first
    before = criterion.priors["router0"].clone()
    criterion.eval()(routing(a))
    assert torch.equal(criterion.priors["router0"], before)


@pytest.mark.parametrize("scope", ["local", "router", "network"])
def test_no_samples_give_no_loss_and_no_update(scope):
    criterion = GateClusteringLoss(scope=scope)
    assert criterion(routing(scores(0, 2, 3))) == 0
    assert all(torch.equal(prior, torch.full_like(prior, 1 / 3)) for prior in criterion.priors.values())


def test_compiles_without_a_break():
    ours, compiled, a = GateClusteringLoss(), GateClusteringLoss(), scores(16, 2, 3)
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(call(routing(a)), ours(routing(a)))
    torch.testing.assert_close(compiled.priors, ours.priors)


def test_priors_are_saved():
    criterion = GateClusteringLoss()
    criterion(routing(scores(32, 2, 3)))
    copy = GateClusteringLoss()
    copy.load_state_dict(criterion.state_dict())
    assert torch.equal(copy.priors["router0"], criterion.priors["router0"])
    criterion(routing(scores(32, 2, 3)))
    assert not torch.equal(copy.priors["router0"], criterion.priors["router0"])


def test_a_router_clusters_as_a_whole():
    a, b = scores(16, 2, 3), scores(16, 1, 2, seed=1)
    criterion = GateClusteringLoss(scope="router")
    even = mixture_em_loss(a[:, 0] + a[:, 1], prior=torch.full((3,), 1 / 3))
    torch.testing.assert_close(
        criterion(routing(a, b)), even.loss + mixture_em_loss(b[:, 0], prior=torch.full((2,), 0.5)).loss
    )
    torch.testing.assert_close(criterion.priors["router0"], 0.9 / 3 + 0.1 * even.posterior.mean(0))


def test_the_balance_is_that_of_the_whole_network():
    a, b, c, d = scores(16, 2, 3), scores(16, 1, 2, seed=1), scores(16, 2, 2, skew=3.0, seed=2), scores(16, 2, 1)
    local, network = (GateClusteringLoss(scope=scope)(routing(a, b, c, d)) for scope in ("local", "network"))
    threes = a.softmax(-1).mean((0, 1))
    twos = torch.stack([v.softmax(-1).mean(0) for v in (b[:, 0], c[:, 0], c[:, 1])]).mean(0)
    expected = sum((g * (len(g) * g).log()).sum() for g in (threes, twos))
    torch.testing.assert_close(network - local, expected)


def test_gates_skewed_to_opposite_sides_are_in_balance():
    """The balance ignores how each single gate clusters."""
    a = torch.zeros(16, 2, 2)
    a[:, 0, 0] = a[:, 1, 1] = 9.0
    local, network = (GateClusteringLoss(scope=scope)(routing(a)) for scope in ("local", "network"))
    assert (network - local).abs() < 1e-6
    a[:, 1] = a[:, 0].clone()
    b = a.requires_grad_()
    one_sided = GateClusteringLoss(scope="network")(routing(b))
    assert (one_sided - local).item() == pytest.approx(math.log(2), abs=5e-3)
    one_sided.backward()
    assert (b.grad[..., 0] > 0).all()  # less to the path that gets everything


def test_its_gradient_reaches_the_gates():
    torch.manual_seed(0)
    router, criterion = CrossConnection(6, 1, 2), GateClusteringLoss()
    torch.nn.init.normal_(router.w2)
    optimizer, x = torch.optim.SGD([router.w1, router.b1, router.w2], lr=0.5), torch.randn(256, 6, 3, 3)
    losses = []
    for _ in range(50):
        router.zero_grad()
        losses.append(criterion({"router": router([x], return_routing=True)[1]}))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01
    assert all(parameter.grad.abs().max() > 0 for parameter in (router.w1, router.b1, router.w2))
    # Normalised scores lack what all samples have in common.
    assert router.b2.grad.abs().max() < 1e-6


@pytest.mark.parametrize("scope", ["local", "router", "network"])
def test_counted_once_under_activation_checkpointing(scope):
    torch.manual_seed(0)
    router, x = CrossConnection(6, 1, 2), torch.randn(32, 6, 3, 3)
    gradients = []
    for recompute in (False, True):
        criterion = GateClusteringLoss(scope=scope)
        router.zero_grad()

        def routed(x):
            return router([x], return_routing=True)[1]

        decided = checkpoint(routed, x, use_reentrant=False) if recompute else routed(x)
        criterion({"router": decided}).backward()
        gradients.append([p.grad.clone() for p in router.parameters()] + [criterion.priors["router"]])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_sparse_routers():
    router = SparseRouter(4, [torch.nn.Identity() for _ in range(3)])
    _, decided = router(torch.randn(16, 4, 2, 2), return_routing=True)
    GateClusteringLoss()({"sparse": decided}).backward()
    assert router.w2.grad is not None
    a = scores(16, 3)
    gates = a.softmax(-1) * torch.tensor([1.0, 1.0, 0.0])  # no sample goes to the last path
    GateClusteringLoss(scope="network")({"sparse": SparseRouting(gates, a, None, None)}).backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"gamma": 0}, "gamma is 0; it must be greater than 0"),
        ({"scope": "layer"}, "scope is 'layer'; it must be 'local', 'router' or 'network'"),
        ({"prior_momentum": 0.0}, "prior_momentum is 0.0; it must be above 0 and up to 1, or None"),
        ({"prior_momentum": 1.5}, "prior_momentum is 1.5; it must be above 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GateClusteringLoss(**arguments)


def test_a_batch_with_nan_leaves_the_priors():
    loss, scores = GateClusteringLoss(), torch.randn(16, 2, 3)
    loss({"a": Routing(scores.softmax(-1), scores)})
    before, spoiled = loss.get_extra_state()["a"].clone(), scores.clone()
    spoiled[0, 0] = float("nan")
    loss({"a": Routing(spoiled.softmax(-1), spoiled)})
    after = loss.get_extra_state()["a"]
    assert after[0].equal(before[0]) and not after[1].equal(before[1])
    assert loss({"a": Routing(scores.softmax(-1), scores)}).isfinite()


@pytest.mark.parametrize("training", [False, True])
def test_inference_mode_keeps_nothing(training):
    loss, scores = GateClusteringLoss().train(training), torch.randn(16, 2, 3)
    with torch.inference_mode():
        loss({"a": Routing(scores.softmax(-1), scores)})
    assert not loss.priors
    loss.train()({"a": Routing(scores.softmax(-1), scores)})
    assert loss.priors["a"].shape == (2, 3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_has_the_same_gradients_and_counts_a_batch_once(reentrant):
    torch.manual_seed(0)
    plain, other = (GateClusteringLoss(prior_momentum=0.5) for _ in range(2))

    def regularise(loss, x):
        return loss({"a": Routing(x.softmax(-1), x)})

    for scores in torch.randn(3, 16, 2, 3, dtype=torch.float64):
        x, y = (scores.clone().requires_grad_() for _ in range(2))
        regularise(plain, x).backward()
        checkpoint(regularise, other, y, use_reentrant=reentrant).backward()
        assert torch.equal(x.grad, y.grad) and torch.equal(plain.priors["a"], other.priors["a"])


def test_exports_with_batches_of_any_size():
    class Balanced(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = GateClusteringLoss(prior_momentum=None, scope="network")

        def forward(self, gates, scores):
            return self.loss({"a": Routing(gates, scores)})

    module, batch = Balanced().eval(), {0: torch.export.Dim("batch", min=2)}
    given = [torch.randn(n, 2, 3) for n in (4, 7)]
    exported = torch.export.export(module, (given[0].softmax(-1), given[0]), dynamic_shapes=(batch, batch))
    inputs = given[1].softmax(-1), given[1]
    torch.testing.assert_close(exported.module()(*inputs), module(*inputs))


def drifting(n):
    """Scores of two gating vectors, whose samples differ from the first to the last."""
    return scores(n, 2, 3).detach().double() + torch.linspace(-2, 2, n)[:, None, None] * torch.tensor([1.0, 0.0, 0.5])


def _regularised(scope, given):
    """Return the loss, the gradient of the scores, and the priors, of the second of two steps."""
    loss, given = GateClusteringLoss(scope=scope), given.clone().requires_grad_()
    for _ in range(2):
        value = loss(routing(given))
    (gradient,) = torch.autograd.grad(value, given)
    return value.detach(), gradient, loss.priors["router0"]


def _one_of_two(rank, place, results):
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    part = slice(0, 8) if rank == 0 else slice(8, 16)
    for scope in ("local", "router", "network"):
        results[scope, rank] = _regularised(scope, drifting(16)[part])
        fixed = GateClusteringLoss(prior_momentum=None, scope=scope)
        given = drifting(16)[part].requires_grad_()
        (wanted,) = torch.autograd.grad(fixed(routing(given)), given)
        found = grad(lambda given, fixed=fixed: fixed(routing(given)))(given.detach())
        torch.testing.assert_close(found, wanted)
    evaluated = GateClusteringLoss().eval()
    if rank == 0:  # alone, as processes may have other numbers of batches
        results["evaluated"] = evaluated(routing(drifting(8)))
    dist.destroy_process_group()


def test_processes_share_the_statistics_of_the_batch(tmp_path):
    results = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(_one_of_two, (tmp_path / "store", results), nprocs=2)
    for scope in ("local", "router", "network"):
        (first, left, prior), (second, right, other) = results[scope, 0], results[scope, 1]
        found = (first + second) / 2, torch.cat([left, right]) / 2, prior  # gradients as DistributedDataParallel has
        torch.testing.assert_close(found, _regularised(scope, drifting(16)), rtol=1e-6, atol=1e-8)
        assert torch.equal(prior, other)
    torch.testing.assert_close(results["evaluated"], GateClusteringLoss().eval()(routing(drifting(8))))


def test_transforms_leave_nothing_behind():
    router, loss = CrossConnection(4, 2, 2, dtype=torch.float64), GateClusteringLoss()
    parameters = {name: p.detach() for name, p in router.named_parameters()}

    def regularised(parameters, x):
        _, routing = functional_call(router, parameters, ([x, x + 1],), {"return_routing": True})
        return loss({"a": routing})

    x = torch.randn(3, 6, 4, 5, 5, dtype=torch.float64)
    for _ in range(2):
        each = vmap(grad(regularised), (None, 0))(parameters, x)
    jvp(lambda x: regularised(parameters, x), (x[0],), (x[0],))
    assert not loss.priors and not loss.earlier_priors
    for i in range(3):
        alone = grad(regularised)(parameters, x[i])
        torch.testing.assert_close({name: g[i] for name, g in each.items()}, alone)
    regularised(parameters, x[0])
    assert type(loss.priors["a"]) is torch.Tensor and loss.state_dict()


def test_priors_of_another_number_of_paths_are_not_taken():
    criterion, other = GateClusteringLoss(), scores(16, 2, 4)
    criterion(routing(scores(16, 2, 3)))
    torch.testing.assert_close(criterion(routing(other)), GateClusteringLoss()(routing(other)))


def test_the_routing_of_one_router_alone_is_refused():
    gates = torch.rand(4, 2, 2).softmax(-1)
    with pytest.raises(TypeError, match="routing is a Routing; it must be a dict, such as"):
        GateClusteringLoss()(Routing(gates, gates))
