import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from fastroute import ops
from tests.ops.cases import named
from tests.ops.mixture_cases import check, differentiate, draw, eager_loss, make_case

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


SHAPES = [(128, 10), (3, 1), (2, 2), (17, 33), (130, 4, 4), (5, 3, 20), (1000, 2), (4, 300), (33, 1, 5)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("priors", [False, True])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("augmented", [False, True])
def test_loss_posterior_and_gradient(backend, dtype, priors, statistics, augmented):
    for shape in SHAPES:
        with named(shape=shape):
            check(make_case(shape, dtype, priors, statistics, augmented))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(8, 70), st.integers(1, 40)) | st.tuples(st.integers(8, 20), *[st.integers(1, 8)] * 2),
    dtype=st.sampled_from(DTYPES),
    priors=st.booleans(),
    statistics=st.booleans(),
    augmented=st.booleans(),
    seed=st.integers(0, 99),
)
def test_random_shapes(backend, shape, dtype, priors, statistics, augmented, seed):
    check(make_case(shape, dtype, priors, statistics, augmented, seed))


@pytest.mark.parametrize("shape", [(7, 3), (5, 2, 3)], ids=str)
@pytest.mark.parametrize("statistics", [False, True])
def test_gradcheck_with_constant_posteriors(backend, shape, statistics):
    """Finite differences of the loss at fixed p: a function that has our gradient and the plain value."""
    scores, gamma, prior, mean, std, scores_aug = make_case(shape, torch.float64, True, statistics, True)
    posterior = ops.mixture_em_loss(scores, gamma, prior, mean, std, scores_aug).posterior

    class Loss(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, a_aug):
            ctx.save_for_backward(a, a_aug)
            return eager_loss(a, gamma, prior, mean, std, a_aug, posterior)[0]

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
                loss, _ = ops.mixture_em_loss(leaves[0], gamma, prior, mean, std, leaves[1])
            return torch.autograd.grad(loss, leaves, grad)

    assert torch.autograd.gradcheck(Loss.apply, (scores.requires_grad_(), scores_aug.requires_grad_()))


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])  # 128 times 0.1 is not 12.8 in float32
def test_constant_scores_give_log_2(backend, value):
    scores = torch.full((128, 10), value, requires_grad=True)
    loss, posterior = ops.mixture_em_loss(scores)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert torch.allclose(posterior, torch.tensor(0.1))
    loss.backward()
    assert not scores.grad.any()


def test_balanced_one_hot_scores(backend):
    """128 samples, 10 clusters in turn."""
    scores = torch.eye(10)[torch.arange(128) % 10]
    assert ops.mixture_em_loss(scores).loss.item() == pytest.approx(0.508, abs=5e-4)


def test_gradient_of_batch_statistics_sums_to_zero(backend):
    scores, *_, scores_aug = make_case((128, 4, 4), augmented=True)
    for leaf in (scores.requires_grad_(), scores_aug.requires_grad_()):
        loss = ops.mixture_em_loss(scores, scores_aug=scores_aug).loss.sum()
        grad = torch.autograd.grad(loss, leaf)[0]
        assert grad.abs().max() > 1e-4
        assert grad.sum(0).abs().max() < 1e-7
        assert (grad * leaf).sum(0).abs().max() < 1e-6  # nor does a column's scale change the loss


def test_shift_and_scale_of_a_column_change_nothing(backend):
    scores = draw(128, 10)
    expected = ops.mixture_em_loss(scores)
    scaled = (scores + torch.linspace(-50, 50, 10)) * torch.logspace(-12, 12, 10)
    for ours, theirs in zip(ops.mixture_em_loss(scaled), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gates_are_mixtures_of_their_own(backend):
    scores, gamma, prior, mean, std, scores_aug = make_case((20, 3, 5), priors=True, statistics=True, augmented=True)
    loss, posterior = ops.mixture_em_loss(scores, gamma, prior, mean, std, scores_aug)
    assert loss.shape == (3,)
    for i in range(3):
        alone = ops.mixture_em_loss(scores[:, i], gamma, prior[i], mean[i], std[i], scores_aug[:, i])
        torch.testing.assert_close(loss[i], alone.loss)
        torch.testing.assert_close(posterior[:, i], alone.posterior)


def test_one_row_of_constants_serves_all_gates(backend):
    scores, gamma, prior, mean, std, _ = make_case((20, 3, 5), priors=True, statistics=True)
    row = [t[0] for t in (prior, mean, std)]
    for ours, theirs in zip(
        ops.mixture_em_loss(scores, gamma, *row),
        ops.mixture_em_loss(scores, gamma, *(t.expand(3, 5) for t in row)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def test_even_priors_only_add_their_logarithm(backend):
    scores = draw(50, 4)
    without, (loss, posterior) = ops.mixture_em_loss(scores), ops.mixture_em_loss(scores, prior=torch.full((4,), 0.25))
    torch.testing.assert_close(posterior, without.posterior)
    torch.testing.assert_close(loss, without.loss + math.log(4))


def test_a_cluster_of_prior_zero_is_empty(backend):
    scores = draw(50, 3).requires_grad_()
    loss, posterior = ops.mixture_em_loss(scores, prior=torch.tensor([0.5, 0.5, 0.0]))
    loss.backward()
    assert posterior[:, 2].max() < 1e-30 and loss.isfinite() and scores.grad.isfinite().all()
    torch.testing.assert_close(posterior[:, :2], ops.mixture_em_loss(scores[:, :2]).posterior)
    # No score, however large, outweighs a prior of 0, or a prior near 0 in float64.
    statistics = {"mean": torch.zeros(3), "std": torch.ones(3)}
    loss, posterior = ops.mixture_em_loss(torch.tensor([[100.0, 0, 0]]), 5.0, torch.tensor([0, 0.5, 0.5]), **statistics)
    torch.testing.assert_close(posterior, torch.tensor([[0, 0.5, 0.5]]))
    assert loss.item() == pytest.approx(2 * math.log(2))
    tiny = torch.tensor([1e-100, 0.5, 0.5], dtype=torch.float64)
    _, posterior = ops.mixture_em_loss(torch.tensor([[200.0, 0, 0]], dtype=torch.float64), 5.0, tiny, **statistics)
    assert posterior[0, 0].item() == pytest.approx(2e-100 * math.exp(200), rel=1e-6)


def test_no_and_one_sample(backend):
    empty = torch.empty(0, 3, 4, requires_grad=True)
    loss, posterior = ops.mixture_em_loss(empty)
    assert torch.equal(loss, torch.zeros(3)) and posterior.shape == (0, 3, 4)
    loss.sum().backward()
    assert empty.grad.shape == (0, 3, 4)
    one = torch.randn(1, 4, requires_grad=True)
    loss, posterior = ops.mixture_em_loss(one)  # its own mean: nothing is known of it
    assert torch.equal(posterior, torch.full((1, 4), 0.25)) and loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert not one.grad.any()


def test_extreme_scores(backend):
    """Far from given statistics, neither exp nor log overflows."""
    scores = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss, posterior = ops.mixture_em_loss(scores, 1.0, None, torch.zeros(2), torch.ones(2))
    assert torch.equal(posterior, torch.eye(2)) and loss.item() == 0
    loss.backward()
    assert not scores.grad.any()
    swapped = ops.mixture_em_loss(scores, 1.0, None, torch.zeros(2), torch.ones(2), -scores).loss
    assert swapped.item() == pytest.approx(1e4)


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-38], ids=str)
def test_scores_of_any_size(backend, scale):
    """Normalised scores do not depend on the scale, which no square of a distance may over- or underflow."""
    scores = draw(20, 5).requires_grad_()
    loss, posterior = ops.mixture_em_loss(scores)
    scaled = (scores.detach() * scale).requires_grad_()
    scaled_loss, scaled_posterior = ops.mixture_em_loss(scaled)
    assert_close(scaled_loss, loss)
    assert_close(scaled_posterior, posterior, rtol=1e-4, atol=1e-6)
    [grad], [scaled_grad] = torch.autograd.grad(loss, scores), torch.autograd.grad(scaled_loss, scaled)
    if scale > 1e-36:  # or the gradient, which grows as the scores shrink, is no float32
        assert_close(scaled_grad * scale, grad, rtol=1e-4, atol=1e-7)


def test_a_deviation_whose_inverse_overflows_counts_as_0(backend):
    scores = torch.stack([draw(20, seed=1), draw(20, seed=2) * 1e-43], 1)
    loss, posterior = ops.mixture_em_loss(scores)
    flat = torch.stack([scores[:, 0], torch.zeros(20)], 1)
    assert_close((loss, posterior), tuple(ops.mixture_em_loss(flat)))


@pytest.mark.parametrize("shape", [(64, 1024), (50000, 4)], ids=str)
def test_sums_of_many_terms(backend, shape):
    """The error does not grow with the number of clusters or of samples."""
    scores = draw(*shape)
    loss, exact = ops.mixture_em_loss(scores).loss, ops.mixture_em_loss(scores.double()).loss
    assert (loss.double() - exact).abs() <= 5e-7 * exact.abs()


def test_threads_do_not_keep_much_memory(native_library):
    import resource

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    ops.mixture_em_loss(draw(8, 1024))
    before = resident()
    ops.mixture_em_loss(torch.ones(30000, 1024))  # 250 MB of scratch
    assert resident() - before < 32 << 20


def test_nan_is_not_hidden(backend):
    scores = draw(20, 2, 3)
    scores[4, 0, 1] = math.nan
    loss, posterior = ops.mixture_em_loss(scores)
    assert loss[0].isnan() and not loss[1].isnan()
    assert posterior[:, 0].isnan().all() and not posterior[:, 1].isnan().any()


def test_any_strides(backend):
    scores = draw(5, 20, 3).permute(1, 2, 0)
    for ours, theirs in zip(ops.mixture_em_loss(scores), ops.mixture_em_loss(scores.contiguous()), strict=True):
        assert torch.equal(ours, theirs)


def test_bitwise_repeatable(backend):
    case = make_case((1000, 4, 20), priors=True, augmented=True)
    first, second = (differentiate(ops.mixture_em_loss, case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_element_is_written(backend):
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # with it, fresh memory is full of NaN
    try:
        for shape in SHAPES:
            with named(shape=shape):
                results = differentiate(ops.mixture_em_loss, make_case(shape, augmented=True, priors=True))
                assert all(torch.isfinite(t).all() for t in results)
    finally:
        torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("backend", ["default", "reference"], indirect=True)  # the operator itself: no call by Python
@pytest.mark.parametrize("shape", [(7, 3), (6, 2, 4)], ids=str)
def test_opcheck(backend, shape):
    forward, backward = (
        torch.ops.fastroute.mixture_em_loss.default,
        torch.ops.fastroute.mixture_em_loss_backward.default,
    )
    for options in ({}, {"priors": True, "statistics": True, "augmented": True}):
        scores, gamma, prior, mean, std, scores_aug = make_case(shape, **options)
        arguments = scores, scores_aug, prior, mean, std, gamma
        torch.library.opcheck(forward, arguments)
        needed = [t if t is None else t.clone().requires_grad_() for t in arguments[:2]]
        torch.library.opcheck(forward, (*needed, *arguments[2:]))
        loss, posterior, means, scales = forward(*arguments)
        torch.library.opcheck(backward, (scores, scores_aug, posterior, means, scales, loss, gamma, mean is None))


def test_compiles_whole_with_a_changing_batch(backend):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(scores):
        loss, posterior = ops.mixture_em_loss(scores * 2, prior=torch.tensor([0.5, 0.25, 0.25]))
        return loss, posterior

    for batch in (2, 3, 5, 8):
        scores = draw(batch, 3, seed=batch)
        ours, plain = scores.clone().requires_grad_(), scores.clone().requires_grad_()
        loss, posterior = step(ours)
        expected = ops.mixture_em_loss(plain * 2, prior=torch.tensor([0.5, 0.25, 0.25]))
        torch.testing.assert_close(loss, expected.loss)
        torch.testing.assert_close(posterior, expected.posterior)
        loss.backward()
        expected.loss.backward()
        torch.testing.assert_close(ours.grad, plain.grad)


def test_autocast(backend):
    layer, x = torch.nn.Linear(6, 4), draw(20, 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss, posterior = ops.mixture_em_loss(layer(x), prior=torch.full((4,), 0.25))
    assert loss.dtype == posterior.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.abs().max() > 0


def test_posterior_is_a_constant(backend):
    loss, posterior = ops.mixture_em_loss(draw(5, 3).requires_grad_())
    assert loss.requires_grad and not posterior.requires_grad


def test_no_second_derivative(backend):
    scores = draw(5, 3).requires_grad_()
    (grad,) = torch.autograd.grad(ops.mixture_em_loss(scores).loss, scores, create_graph=True)
    with pytest.raises(RuntimeError, match="holds the posteriors constant"):
        grad.square().sum().backward()


a, aug = torch.zeros(4, 3), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("error", "message", "scores", "options"),
    [
        (ValueError, r"scores has shape \(4,\); it must be \(N, K\)", a[:, 0], {}),
        (ValueError, r"scores has shape \(4, 0\)", a[:, :0], {}),
        (ValueError, r"scores has shape \(4, 1025\).*K from 1 to 1024", torch.zeros(4, 1025), {}),
        (TypeError, "scores has dtype torch.int64", a.long(), {}),
        (TypeError, "scores is None; it must be a tensor", None, {}),
        (TypeError, "prior is a list; it must be a tensor or None", a, {"prior": [0.2, 0.3, 0.5]}),
        (TypeError, "gamma is a str; it must be a number", a, {"gamma": "5"}),
        (ValueError, "gamma is 0.0; it must be greater than 0", a, {"gamma": 0}),
        (ValueError, "gamma is nan", a, {"gamma": math.nan}),
        (ValueError, r"prior has shape \(4,\); it must have shape \(3,\)", a, {"prior": torch.full((4,), 0.25)}),
        (ValueError, r"prior is \[1.0, 1.0, 1.0\]; it must be .* sum 1", a, {"prior": torch.ones(3)}),
        (ValueError, r"prior is \[1.5, -0.5, 0.0\]", a, {"prior": torch.tensor([1.5, -0.5, 0.0])}),
        (ValueError, r"prior is \[nan", a, {"prior": torch.full((3,), math.nan)}),
        (TypeError, "prior has dtype torch.float64", a, {"prior": torch.full((3,), 1 / 3).double()}),
        (ValueError, "prior is on meta", a, {"prior": torch.ones(3, device="meta")}),
        (ValueError, "mean is given without std", a, {"mean": torch.zeros(3)}),
        (ValueError, "std is given without mean", a, {"std": torch.ones(3)}),
        (ValueError, r"std is \[1.0, -1.0, 1.0\]", a, {"mean": torch.zeros(3), "std": torch.tensor([1.0, -1, 1])}),
        (ValueError, r"mean has shape \(2, 3\)", a, {"mean": torch.zeros(2, 3), "std": torch.ones(3)}),
        (ValueError, r"scores_aug has shape \(4, 2\)", a, {"scores_aug": aug[:, :2]}),
        (TypeError, "scores_aug has dtype torch.float64", a, {"scores_aug": aug.double()}),
        (ValueError, "scores_aug has device meta", a, {"scores_aug": aug.to("meta")}),
    ],
)
def test_bad_input(refused, error, message, scores, options):
    refused(error, message, ops.mixture_em_loss, scores, **options)


@pytest.mark.parametrize("clusters", [3, 6, 10])
def test_a_prior_of_half_the_precision_may_be_off_by_its_rounding(backend, clusters):
    prior = torch.full((clusters,), 1 / clusters, dtype=torch.bfloat16)
    scores = draw(8, clusters).bfloat16()
    torch.testing.assert_close(
        ops.mixture_em_loss(scores, prior=prior).posterior, ops.mixture_em_loss(scores).posterior, rtol=1e-2, atol=1e-3
    )
    with pytest.raises(ValueError, match="it must be numbers from 0 on with sum 1"):
        ops.mixture_em_loss(scores, prior=1.02 * prior)
