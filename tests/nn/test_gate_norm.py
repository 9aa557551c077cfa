"""Gates as posteriors of normalised scores."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from fastroute.models import create_model
from fastroute.nn import (
    CrossConnection,
    CrossPrediction2d,
    GateClusteringLoss,
    GateNorm,
    SparseRouter,
    set_gate_norm,
)
from tests.threads import small_networks  # noqa: F401

NORMS = [(kind, prior) for kind in ("center", "standardize") for prior in (None, "learned")]


def inputs(m=2, channels=8, batch=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, channels, 5, 5, generator=generator).to(dtype).requires_grad_() for _ in range(m)]


def router(kind, prior, **options):
    torch.manual_seed(0)
    layer = CrossConnection(8, 2, 3, gate_norm=kind, prior=prior, **options)
    torch.nn.init.normal_(layer.w2)
    return layer


def written_out(layer, xs, mean=None, std=None):
    """Compute outputs, gates and scores by the equations; μ and σ are the batch's by default."""
    xs = [x.relu() if layer.activation else x for x in xs]
    pooled = torch.stack([x.mean((2, 3)) for x in xs], 1)
    hidden = pooled if layer.w1 is None else torch.einsum("smc,mgc->smg", pooled, layer.w1)
    if layer.w1 is not None:
        hidden = torch.relu(hidden if layer.b1 is None else hidden + layer.b1)
    scores = torch.einsum("smg,mng->smn", hidden, layer.w2)
    scores = scores if layer.b2 is None else scores + layer.b2
    scores = scores - (scores.mean(0) if mean is None else mean)
    if layer.gate_norm.kind == "standardize":
        scores = scores / (scores.square().mean(0).sqrt() if std is None else std)
    logits = scores / layer.temperature
    gates = (logits if layer.gate_norm.prior is None else logits + layer.gate_norm.prior.log()).softmax(-1)
    return (
        [sum(gates[:, i, j, None, None, None] * x for i, x in enumerate(xs)) for j in range(layer.out_paths)],
        gates,
        scores,
    )


@pytest.mark.parametrize(
    "options", [{}, {"activation": "relu", "temperature": 3.0}, {"bias": False, "gate_channels": 0}]
)
@pytest.mark.parametrize("kind, prior", NORMS)
def test_training_follows_the_equations_with_their_gradients(kind, prior, options):
    layer, xs = router(kind, prior, **options).double(), inputs(dtype=torch.float64)
    if prior:
        layer.gate_norm.prior.copy_(torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]]))
    expected, gates, scores = written_out(copy.deepcopy(layer), xs)
    wanted = torch.autograd.grad(
        sum((k + 1) * y.square().sum() for k, y in enumerate(expected)) + scores.pow(3).sum(), xs
    )
    outputs, routing = layer(xs, return_routing=True)
    found = torch.autograd.grad(
        sum((k + 1) * y.square().sum() for k, y in enumerate(outputs)) + routing.scores.pow(3).sum(), xs
    )
    torch.testing.assert_close((outputs, *routing), (expected, gates, scores))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "options", [{}, {"activation": "relu", "temperature": 3.0}, {"bias": False, "gate_channels": 0}]
)
@pytest.mark.parametrize("kind, prior", NORMS)
def test_evaluation_folds_the_running_statistics(kind, prior, options):
    layer, xs = router(kind, prior, **options), inputs()
    for k in range(5):
        layer([x + k for x in xs])
    layer.eval()
    norm = layer.gate_norm
    before = copy.deepcopy(norm.state_dict())
    outputs, routing = layer(xs, return_routing=True)
    torch.testing.assert_close(
        (outputs, *routing), written_out(layer, xs, norm.running_mean, norm.running_std), rtol=1e-4, atol=1e-5
    )
    assert all(value.equal(before[name]) for name, value in norm.state_dict().items())
    torch.testing.assert_close(layer(xs), outputs)


@pytest.mark.parametrize("kind, prior", NORMS)
def test_evaluation_becomes_training_on_the_same_batch(kind, prior):
    layer, xs = router(kind, prior), inputs()
    for _ in range(200):
        layer(xs)
    _, training = layer(xs, return_routing=True)
    _, evaluation = layer.eval()(xs, return_routing=True)
    torch.testing.assert_close(evaluation.scores, training.scores, rtol=1e-4, atol=1e-5)
    moved = 5e-3 if prior else 1e-5  # the priors still move, since they depend on themselves
    torch.testing.assert_close(evaluation.gates, training.gates, rtol=0, atol=moved)
    if prior:
        torch.testing.assert_close(training.gates.mean(0), layer.gate_norm.prior, rtol=0, atol=moved)


@pytest.mark.parametrize("kind", ["center", "standardize"])
def test_normalised_gates_ignore_the_bias(kind):
    layer, xs = router(kind, None), inputs()
    _, before = layer(xs, return_routing=True)
    with torch.no_grad():
        layer.b2[0, 0] += 100
    _, after = layer(xs, return_routing=True)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind, prior", NORMS)
def test_cross_prediction_and_sparse_routers(kind, prior):
    torch.manual_seed(0)
    for layer, given in (
        (CrossPrediction2d(8, 4, 3, 2, 3, gate_norm=kind, prior=prior), inputs()),
        (SparseRouter(8, [torch.nn.Conv2d(8, 4, 3) for _ in range(3)], 2, gate_norm=kind, prior=prior), inputs(1)[0]),
    ):
        torch.nn.init.normal_(layer.w2)
        for _ in range(200):
            layer(given)
        ys, training = layer(given, return_routing=True)
        sum(y.sum() for y in ys).backward()
        assert layer.w2.grad.isfinite().all() and layer.w2.grad.abs().max() > 0
        torch.testing.assert_close(training.scores.mean(0), torch.zeros_like(training.scores[0]), atol=1e-5, rtol=0)
        _, evaluation = layer.eval()(given, return_routing=True)
        torch.testing.assert_close(evaluation.gates, training.gates, rtol=0, atol=5e-3 if prior else 1e-4)
        torch.testing.assert_close(evaluation.scores, training.scores, rtol=1e-3, atol=1e-4)


def test_half_precision_and_autocast():
    layer, xs = router("standardize", "learned"), inputs()
    _, exact = layer(xs, return_routing=True)
    layer.gate_norm.reset_running_stats()
    with torch.autocast("cpu", torch.bfloat16):
        ys, routing = layer([x.bfloat16() for x in xs], return_routing=True)
    assert ys[0].dtype == torch.bfloat16 and routing.scores.dtype == torch.float32
    torch.testing.assert_close(routing.scores, exact.scores, rtol=0.1, atol=0.1)
    assert layer.gate_norm.running_mean.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_whole_graphs(training):
    layer, xs = router("standardize", "learned"), [x.detach() for x in inputs()]
    layer(xs)
    eager = copy.deepcopy(layer).train(training)
    compiled = torch.compile(layer.train(training), fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(xs), eager(xs))
    torch.testing.assert_close(layer.gate_norm.state_dict(), eager.gate_norm.state_dict())


@pytest.mark.parametrize(("prior", "fullgraph"), [(None, True), (None, False), ("learned", False)])
def test_a_checkpoint_in_a_graph_counts_a_batch_once(prior, fullgraph):
    layer, xs = router("standardize", prior), inputs()
    eager = copy.deepcopy(layer)

    def loss(layer, xs):
        return sum(y.square().sum() for y in checkpoint(lambda *xs: layer(list(xs)), *xs, use_reentrant=False))

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=fullgraph)
    for _ in range(2):
        found, expected = (torch.autograd.grad(each, xs) for each in (compiled(layer, xs), loss(eager, xs)))
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer.gate_norm.state_dict(), eager.gate_norm.state_dict())
    assert layer.gate_norm.num_batches_tracked == 2


def test_no_graph_computes_a_checkpoint_again_with_learned_priors():
    layer = router("standardize", "learned")
    compiled = torch.compile(
        lambda *xs: checkpoint(lambda *xs: layer(list(xs)), *xs, use_reentrant=False), backend="eager", fullgraph=True
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="side effect"):
        compiled(*inputs())


@pytest.mark.parametrize("strict", [False, True])
def test_exports_in_training_with_batches_of_any_size(strict):
    class Routers(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.router = router("standardize", "learned")

        def forward(self, *xs):
            return self.router(list(xs))

    module, xs = Routers().train(), [x.detach() for x in inputs()]
    eager, batch = copy.deepcopy(module), {0: torch.export.Dim("batch", min=2)}
    exported = torch.export.export(module, tuple(xs), dynamic_shapes=((batch, batch),), strict=strict).module()
    fewer = [x[:7] for x in xs]
    torch.testing.assert_close(exported(*fewer), eager(*fewer))


def test_functional_calls_leave_nothing_behind():
    layers = [router("standardize", "learned") for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    xs = [x.detach() for x in inputs()]
    torch.vmap(lambda *state: torch.func.functional_call(layers[0], state, (xs,)))(parameters, buffers)
    torch.testing.assert_close(copy.deepcopy(layers[0])(xs), layers[1](xs))


def test_state_is_saved_and_needed():
    layer, other, plain = router("center", "learned"), router("center", "learned"), router(None, None)
    layer(inputs())
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other.eval()(inputs()), layer.eval()(inputs()))
    with pytest.raises(RuntimeError, match=r"gate_norm\.running_mean"):
        layer.load_state_dict(plain.state_dict())
    plain.load_state_dict(CrossConnection(8, 2, 3).state_dict())  # files without a normalisation


def test_networks_by_name():
    model = create_model("resnet20_cc2", gate_norm="center", prior="learned")
    x = torch.randn(4, 3, 32, 32)
    logits, routing = model(x, return_routing=True)
    (logits.sum() + GateClusteringLoss()(routing)).backward()
    name, found = next((name, found) for name, found in routing.items() if found.scores.shape[-1] > 1)
    assert found.scores.mean(0).abs().max() < 1e-5, name
    assert model.eval()(x).isfinite().all()
    set_gate_norm(model, None)
    model.load_state_dict(create_model("resnet20_cc2").state_dict())
    with pytest.raises(ValueError, match="gate_norm is 'center'; the network has no router"):
        create_model("resnet20", gate_norm="center")


def test_constant_scores_zero_priors_and_nan():
    layer, xs = router("standardize", "learned"), inputs()
    with torch.no_grad():
        layer.w2.zero_()
        layer.gate_norm.prior[0] = torch.tensor([1.0, 0.0, 0.0])
    _, routing = layer(xs, return_routing=True)
    torch.testing.assert_close(routing.scores, torch.zeros_like(routing.scores))
    torch.testing.assert_close(routing.gates[:, 0], torch.tensor([1.0, 0.0, 0.0]).expand(16, 3))
    layer.gate_norm.reset_running_stats()
    layer([xs[0] * float("nan"), xs[1]])
    assert all(value.isfinite().all() for value in layer.gate_norm.state_dict().values())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_that_is_not_finite_does_not_count(bad, momentum):
    norm, other = (GateNorm("standardize", 2, 3, "learned", momentum) for _ in range(2))
    torch.manual_seed(0)
    for k, scores in enumerate(torch.randn(3, 64, 2, 3) * 0.01 + 5):
        if k < 2:
            norm.logits(torch.full_like(scores, bad).index_fill(1, torch.tensor([0]), 5.0), 1.0)
        for each in (norm, other):
            each.logits(scores, 1.0)
    assert all(value.equal(other.state_dict()[name]) for name, value in norm.state_dict().items())
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 10.0])
def test_a_prior_of_zero_closes_a_path_at_any_temperature(temperature, training):
    layer, xs = router("standardize", "learned", temperature=temperature).train(training), inputs()
    layer.gate_norm.prior.copy_(torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.0, 0.8]]))
    _, routing = layer(xs, return_routing=True)
    assert routing.gates[:, 0, 0].max() < 1e-20 and routing.gates[:, 1, 1].max() < 1e-20
    _, expected = router("standardize", None, temperature=temperature).train(training)(xs, return_routing=True)
    torch.testing.assert_close(routing.scores, expected.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "standardise"}, "kind is 'standardise'; it must be one of 'center', 'standardize'"),
        ({"kind": None}, "kind is None; it must be one of 'center', 'standardize'"),
        ({"prior": "learnt"}, "prior is 'learnt'; it must be one of None, 'learned'"),
    ],
)
def test_bad_arguments_of_the_norm(options, message):
    with pytest.raises(ValueError, match=message):
        GateNorm(**{"kind": "center", "in_paths": 2, "out_paths": 3} | options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"gate_norm": "batch"}, "gate_norm is 'batch'; it must be one of None, 'center', 'standardize'"),
        ({"gate_norm": "center", "prior": "even"}, "prior is 'even'; it must be one of None, 'learned'"),
        ({"prior": "learned"}, "prior is 'learned' without gate_norm; give gate_norm="),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        CrossConnection(8, 2, 2, **options)


def test_a_batch_of_one_has_no_statistics():
    layer = router("center", None)
    with pytest.raises(ValueError, match="scores have 1 samples; in training mode gate_norm='center' needs at least 2"):
        layer([x[:1] for x in inputs()])
    layer.eval()([x[:1] for x in inputs()])


def _one_of_two(rank, place, results):
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    layer, xs = router("standardize", "learned"), inputs()
    part = slice(0, 6) if rank == 0 else slice(6, 16)
    for _ in range(2):
        ys, routing = layer([x[part] for x in xs], return_routing=True)
    sum(y.square().sum() for y in ys).backward()
    dist.all_reduce(layer.w2.grad)
    results[rank] = [routing.gates.detach(), layer.w2.grad, *layer.gate_norm.state_dict().values()]
    results[2 + rank] = [_first_batch(scores, part) for scores in far_from_zero()]
    dist.destroy_process_group()


def far_from_zero():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(16, 2, 3, generator=generator)
    return [scores * deviation + mean for mean, deviation in ((10, 0.01), (1000, 1.0), (0.3, 0.0))]


def _first_batch(scores, part):
    """Return the normalised scores of some of the samples, and the gradient to them."""
    scores = scores[part].clone().requires_grad_()
    normalized = GateNorm("standardize", 2, 3)(scores)
    (gradient,) = torch.autograd.grad(normalized.pow(3).sum(), scores)
    return normalized.detach(), gradient


def test_processes_share_statistics_and_gradients(tmp_path):
    layer, xs = router("standardize", "learned"), inputs()
    for _ in range(2):
        ys, routing = layer(xs, return_routing=True)
    sum(y.square().sum() for y in ys).backward()
    results = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(_one_of_two, (tmp_path / "store", results), nprocs=2)
    torch.testing.assert_close(torch.cat([results[0][0], results[1][0]]), routing.gates, rtol=1e-4, atol=1e-5)
    for rank in range(2):
        torch.testing.assert_close(
            results[rank][1:], [layer.w2.grad, *layer.gate_norm.state_dict().values()], rtol=1e-3, atol=1e-4
        )
    for k, scores in enumerate(far_from_zero()):
        expected = _first_batch(scores.double(), slice(None))
        for found, wanted in zip(zip(results[2][k], results[3][k], strict=True), expected, strict=True):
            torch.testing.assert_close(torch.cat(found).double(), wanted, rtol=1e-3, atol=1e-3)


class Routed(torch.nn.Module):
    def __init__(self, make):
        super().__init__()
        self.router = make()
        torch.nn.init.normal_(self.router.w2)

    def forward(self, x):
        if isinstance(self.router, SparseRouter):
            return self.router(x)
        left, right = self.router([x])
        return left + 2 * right.tanh()


def routers_of_one_path():
    return [
        *(lambda k=k, p=p: CrossConnection(4, 1, 2, gate_norm=k, prior=p) for k, p in NORMS),
        lambda: SparseRouter(4, [torch.nn.Conv2d(4, 4, 1) for _ in range(3)], 2, routing="cluster"),
    ]


@pytest.mark.parametrize("recompute", ["reentrant", "non-reentrant", "trainer"])
@pytest.mark.parametrize("make", routers_of_one_path())
def test_checkpointing_has_the_same_gradients_and_counts_a_batch_once(make, recompute):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(*(Routed(make) for _ in range(2))).double()
    other, batches = copy.deepcopy(plain), torch.randn(3, 2, 16, 4, 3, 3, dtype=torch.float64).cumsum(0)
    if recompute == "trainer":
        pytest.importorskip("pytorch_lightning")
        from fastroute.training.recomputation import checkpoint_gradients

        checkpoint_gradients(other)
    for both in batches:  # of two forward passes before a backward, only the trainer's checkpoints know the priors
        both = both if recompute == "trainer" else both[:1]
        results = []
        for network in (plain, other):
            xs, blocks = both.clone().requires_grad_(), list(network)
            if network is other and recompute != "trainer":
                blocks = [partial(checkpoint, block, use_reentrant=recompute == "reentrant") for block in network]
            ys = [blocks[1](blocks[0](x)) for x in xs]
            network.zero_grad()
            sum(y.square().sum() for y in ys).backward()
            results.append([xs.grad, *(p.grad for p in network.parameters()), *network.buffers()])
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)
