import math

import pytest
import torch

from fastroute.backends.reference import kernels as reference
from tests.backends.cuda_kernels.cases import DTYPES, check, converted
from tests.ops.mixture_cases import make_case


@pytest.mark.parametrize("shape", [(70, 10), (19, 2, 4), (5, 300), (0, 2, 3), (20, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("priors", "statistics", "augmented"), [(False, False, False), (True, True, True), (True, False, True)]
)
def test_mixture_em(kernels, shape, dtype, priors, statistics, augmented):
    scores, gamma, prior, mean, std, scores_aug = make_case(shape, dtype, priors, statistics, augmented)
    arguments = (scores, scores_aug, prior, mean, std, gamma)
    check(kernels, "mixture_em_loss", arguments)
    loss, posterior, means, scales = reference.mixture_em_loss(*arguments)
    grad_loss = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    saved = (scores, scores_aug, posterior, means, scales, grad_loss, gamma, mean is None)
    check(kernels, "mixture_em_loss_backward", saved)


def test_mixture_em_of_a_constant_and_of_nan(kernels):
    scores = torch.full((128, 2, 3), 0.1, device=kernels.device)
    scores[5, 1, 1] = torch.nan
    loss, posterior, _, scales = kernels.mixture_em_loss(scores, None, None, None, None, 5.0)
    assert loss[0].item() == pytest.approx(math.log(2)) and not scales[:, 0].any()
    assert loss[1].isnan() and posterior[:, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mixture_em_of_a_prior_of_zero(kernels, dtype):
    scores = torch.tensor([[100.0, 0, 0], [0, 1, 2]], dtype=dtype)
    prior, zero = torch.tensor([0, 0.5, 0.5], dtype=dtype), torch.zeros(3, dtype=dtype)
    arguments = (scores, None, prior, zero, zero + 1, 5.0)
    check(kernels, "mixture_em_loss", arguments)
    loss, posterior, *_ = kernels.mixture_em_loss(*converted(arguments, device=kernels.device))
    assert loss.isfinite().all() and not posterior[:, 0].any()
