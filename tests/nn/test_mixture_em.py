import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastroute import ops
from fastroute.nn import ConsistencyLoss, GateClusteringLoss, MixtureEMLoss, RelevanceNorm
from fastroute.nn.mixture_em import normalized_over_processes
from tests.threads import small_networks  # noqa: F401


def blobs(samples=600, seed=0):
    """Three groups of points in the plane, far apart."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.tensor([[0.0, 4.0], [4.0, -3.0], [-4.0, -3.0]])
    labels = torch.arange(samples) % 3
    return centers[labels] + torch.randn(samples, 2, generator=generator), labels


def train(criterion, steps=200):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam([*network.parameters()], lr=3e-3)
    points, _ = blobs()
    for _ in range(steps):
        loss, _ = criterion(network(points[torch.randperm(len(points))[:128]]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network, loss.item()


def test_norm_is_equation_4_11_with_the_batch():
    norm, scores = RelevanceNorm(4, training_statistics="batch"), torch.randn(50, 4) * 3 + 1
    expected = (scores - scores.mean(0)) / scores.std(0, correction=0)
    torch.testing.assert_close(norm(scores), expected)


def test_running_statistics_are_a_moving_average():
    norm, values = RelevanceNorm(2, momentum=0.25), [torch.randn(20, 2) * (i + 1) + i for i in range(6)]
    mean, std = torch.zeros(2), torch.ones(2)
    for i, scores in enumerate(values):
        norm(scores)
        weight = max(0.25, 1 / (i + 1))
        mean = mean + weight * (scores.mean(0) - mean)
        std = std + weight * (scores.std(0, correction=0) - std)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_std, std)
    exact = RelevanceNorm(2, momentum=0.1, dtype=torch.float64)
    for value in values:
        exact(value.double())
    weights = [max(1 / (i + 1), 0.1) for i in range(6)]
    mean = values[0].double().mean(0)
    for weight, value in zip(weights[1:], values[1:], strict=True):
        mean = mean + weight * (value.double().mean(0) - mean)
    torch.testing.assert_close(exact.running_mean, mean, rtol=1e-13, atol=1e-13)
    plain = RelevanceNorm(2, momentum=None)
    for scores in values:
        plain(scores)
    torch.testing.assert_close(plain.running_mean, torch.stack([scores.mean(0) for scores in values]).mean(0))
    plain.reset_running_stats()
    assert not plain.running_mean.any() and plain.num_batches_tracked == 0


def test_training_and_evaluation_are_one_function():
    norm = RelevanceNorm(3)
    for _ in range(5):
        norm(torch.randn(30, 3) * 2 + 7)
    scores = torch.randn(30, 3)
    normalized = norm(scores, track=False)
    torch.testing.assert_close(normalized, norm.eval()(scores))
    torch.testing.assert_close(normalized, (scores - norm.running_mean) / norm.running_std)


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_gradient_goes_through_the_batch(statistics):
    torch.manual_seed(0)
    norm, scores = RelevanceNorm(3, training_statistics=statistics), torch.randn(30, 3, requires_grad=True)
    norm(torch.randn(30, 3) * 2 + 7)
    incoming = torch.randn(30, 3)
    norm(scores, track=False).backward(incoming)
    std = scores.detach().std(0, correction=0)
    plain = scores.detach().requires_grad_()
    ((plain - plain.mean(0)) / plain.std(0, correction=0)).backward(incoming)
    expected = plain.grad * (std / norm.running_std if statistics == "running" else 1)
    torch.testing.assert_close(scores.grad, expected)
    assert scores.grad.sum(0).abs().max() < 1e-6


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_trained_network_clusters_alike_in_training_and_evaluation(statistics):
    criterion = MixtureEMLoss(norm=RelevanceNorm(3, training_statistics=statistics))
    network, _ = train(criterion)
    points, labels = blobs(seed=1)
    with torch.no_grad():
        training = criterion(network(points)).posterior.argmax(1)
        evaluation = criterion.eval()(network(points)).posterior.argmax(1)
        alone = torch.cat([criterion(network(part)).posterior.argmax(1) for part in points.split(1)])
    assert (training == evaluation).float().mean() > 0.99
    assert torch.equal(alone, evaluation)  # a sample's result does not depend on its batch
    table = torch.zeros(3, 3).index_put_((labels, evaluation), torch.ones(600), accumulate=True)
    assert table.max(1).values.sum() > 590 and len(set(table.argmax(1).tolist())) == 3


def test_constant_statistics_would_run_away():
    """With constant statistics all scores would only rise, so the gradient must go through the batch."""

    class Constants(RelevanceNorm):
        def forward(self, scores):
            super().forward(scores.detach())
            return (scores - self.running_mean.clone()) / self.running_std.clone()

    norms = RelevanceNorm(3), Constants(3)
    losses = [train(MixtureEMLoss(norm=norm), steps=600)[1] for norm in norms]
    assert norms[0].running_mean.abs().max() < 2 and losses[0] < 0.61
    assert norms[1].running_mean.min() > 20 and losses[1] > 0.63


@pytest.mark.parametrize("gates", [None, 2])
def test_mixture_em_loss_is_the_operator(gates):
    shape = (40, 3) if gates is None else (40, gates, 3)
    norm, scores, scores_aug = RelevanceNorm(3, num_gates=gates), torch.randn(shape), torch.randn(shape)
    prior = torch.tensor([0.2, 0.3, 0.5])
    ours = MixtureEMLoss(4.0, norm)(scores, scores_aug, prior)
    theirs = ops.mixture_em_loss(scores, 4.0, prior, norm.running_mean, norm.running_std, scores_aug)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        MixtureEMLoss(4.0)(scores, scores_aug, prior), ops.mixture_em_loss(scores, 4.0, prior, scores_aug=scores_aug)
    )
    assert norm.num_batches_tracked == 1  # only by the originals


def test_augmented_scores_may_have_statistics_of_their_own():
    criterion = MixtureEMLoss(norm=RelevanceNorm(3), norm_aug=RelevanceNorm(3))
    scores = torch.randn(40, 3)
    apart, same = criterion(scores, 5 * scores + 3), MixtureEMLoss()(scores, scores)
    torch.testing.assert_close(apart, same)


def test_consistency_is_the_divergence_with_p_constant():
    p, a = torch.randn(20, 4).softmax(-1).requires_grad_(), torch.randn(20, 4, requires_grad=True)
    loss = ConsistencyLoss()(p, a)
    q = a.softmax(-1)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum(-1).mean())
    loss.backward()
    assert p.grad is None
    torch.testing.assert_close(a.grad, (q - p).detach() / 20)
    certain = torch.eye(4)
    assert ConsistencyLoss()(certain, 100 * certain).item() == pytest.approx(0)
    assert ConsistencyLoss()(certain, certain.log()).item() == 0  # of clusters that neither has
    assert ConsistencyLoss()(torch.rand(5, 2, 4).softmax(-1), torch.rand(5, 2, 4)).shape == (2,)
    assert ConsistencyLoss()(torch.rand(0, 4), torch.rand(0, 4)) == 0


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_checkpointing_counts_a_batch_once(statistics):
    plain, other = (RelevanceNorm(3, training_statistics=statistics, dtype=torch.float64) for _ in range(2))
    for x in torch.randn(3, 16, 3, dtype=torch.float64).cumsum(0):
        xs = [x.clone().requires_grad_() for _ in range(2)]
        plain(xs[0]).tanh().square().sum().backward()
        checkpoint(lambda x: other(x).tanh(), xs[1], use_reentrant=False).square().sum().backward()
        torch.testing.assert_close(xs[1].grad, xs[0].grad)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), other.buffers(), strict=True))


def test_constant_scores():
    norm, scores = RelevanceNorm(3), torch.full((20, 3), 0.5, requires_grad=True)
    loss, _ = MixtureEMLoss(norm=norm)(scores)
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert not scores.grad.any() and not norm.eval()(scores).any()


@pytest.mark.parametrize("training_statistics", ["running", "batch"])
def test_keeps_double_precision(training_statistics):
    scores = 1e6 + 1e-3 * torch.randn(50, 3, dtype=torch.float64)
    expected = (scores - scores.mean(0)) / scores.std(0, correction=0)
    norm = RelevanceNorm(3, training_statistics=training_statistics)
    normalized = norm(scores)
    assert normalized.dtype == torch.float64 and norm.running_mean.dtype == torch.float32
    torch.testing.assert_close(normalized - normalized.mean(0), expected, rtol=1e-6, atol=1e-6)
    loss, posterior = MixtureEMLoss(norm=norm)(scores, prior=torch.full((3,), 1 / 3, dtype=torch.float64))
    assert loss.dtype == posterior.dtype == torch.float64
    half = RelevanceNorm(3).half()
    assert half(torch.randn(20, 3).half()).dtype == torch.float32 and half.running_mean.dtype == torch.float16


def test_compiles_and_takes_half_precision():
    norm, scores = RelevanceNorm(3), torch.randn(20, 3, dtype=torch.bfloat16)
    assert norm(scores).dtype == torch.float32
    compiled = torch.compile(MixtureEMLoss(norm=norm.eval()), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(scores), MixtureEMLoss(norm=norm)(scores))


def _share(rank, port, batches, queue):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    norm = RelevanceNorm(3)
    for batch in batches:
        norm(batch[rank::2])
    queue.put((rank, norm.running_mean.tolist(), norm.running_std.tolist()))
    dist.destroy_process_group()


def test_running_statistics_are_those_of_all_processes():
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    batches = [torch.randn(21, 3) * 0.5 + 40 for _ in range(3)]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    torch.multiprocessing.spawn(_share, (port, batches, queue), nprocs=2)
    norm = RelevanceNorm(3)
    for batch in batches:
        norm(batch)
    for _, mean, std in (queue.get(), queue.get()):
        torch.testing.assert_close(torch.tensor(mean), norm.running_mean)
        torch.testing.assert_close(torch.tensor(std), norm.running_std, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RelevanceNorm(0), "num_clusters is 0; it must be 1 to 1024"),
        (lambda: RelevanceNorm(3, 0), "momentum is 0; it must be above 0"),
        (lambda: RelevanceNorm(3, num_gates=0), "num_gates is 0; it must be at least 1"),
        (lambda: RelevanceNorm(3, training_statistics="own"), "training_statistics is 'own'"),
        (lambda: RelevanceNorm(3)(torch.zeros(4, 2)), r"scores have shape \(4, 2\); they must be \(N, 3\)"),
        (lambda: RelevanceNorm(3)(torch.zeros(1, 3)), "scores have 1 samples; in training mode .* at least 2"),
        (lambda: MixtureEMLoss(0), "gamma is 0; it must be greater than 0"),
        (lambda: MixtureEMLoss(norm_aug=RelevanceNorm(3)), "norm_aug is given without norm"),
        (lambda: ConsistencyLoss()(torch.zeros(4, 2), torch.zeros(4, 3)), r"normalized_aug has shape \(4, 3\)"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_repr_is_its_arguments():
    assert repr(RelevanceNorm(3)) == "RelevanceNorm(3, momentum=0.1)"
    assert "num_gates=2, training_statistics='batch'" in repr(
        RelevanceNorm(3, num_gates=2, training_statistics="batch")
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MixtureEMLoss("5"), "gamma is '5'; it must be a number"),
        (lambda: GateClusteringLoss("5"), "gamma is '5'; it must be a number"),
        (lambda: GateClusteringLoss(prior_momentum="a"), "prior_momentum is 'a'; it must be a number"),
        (lambda: RelevanceNorm(3, "a"), "momentum is 'a'; it must be a number"),
    ],
)
def test_numbers_are_numbers(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("statistics", ["running", "batch"])
def test_the_gradient_of_constant_scores_is_nan_nowhere(statistics):
    given = torch.full((20, 3), 0.5, requires_grad=True)
    with torch.autograd.detect_anomaly():  # also where a mask hides NaN later
        (RelevanceNorm(3, training_statistics=statistics)(given) * torch.randn(20, 3)).sum().backward()
    assert not given.grad.any()


def test_scores_that_differ_by_rounding_are_constant_over_processes(tmp_path):
    rounded = 0.1 * (1 + torch.finfo(torch.float64).eps * (torch.arange(8, dtype=torch.float64) % 2))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        normalized = normalized_over_processes(rounded[:, None])
    finally:
        dist.destroy_process_group()
    assert not normalized.any()
