import pytest
import torch

from fastroute import ops, use_backend
from tests.backends.triton_kernels.cases import assert_as_exact_as_eager, tables
from tests.ops import mixture_cases
from tests.ops.cases import moved

MIXTURE_CASES = {  # shape, dtype, priors, statistics, augmented
    "one mixture": ((128, 10), torch.float32, False, False, False),
    "gates": ((19, 3, 4), torch.bfloat16, True, False, True),
    "given statistics": ((40, 2, 5), torch.float16, True, True, True),
    "one cluster": ((9, 1), torch.float32, False, False, True),
    "many clusters": ((9, 300), torch.float32, True, False, False),
}


@pytest.mark.parametrize("values", [2048, 64])  # one step for most of the cases, and many
@pytest.mark.parametrize("case", MIXTURE_CASES)
def test_mixture_em(device, case, values, monkeypatch, poison, launches):
    monkeypatch.setattr(tables, "MIXTURE_VALUES", values)
    case = mixture_cases.make_case(*MIXTURE_CASES[case])
    case = [moved(t, device) if isinstance(t, torch.Tensor) else t for t in case]
    with use_backend("triton"):
        results = mixture_cases.differentiate(ops.mixture_em_loss, case)
        again = mixture_cases.differentiate(ops.mixture_em_loss, case)
    plain = [mixture_cases.differentiate(mixture_cases.eager_loss, case, dtype) for dtype in (None, torch.float64)]
    assert_as_exact_as_eager(*({str(i): t for i, t in enumerate(values)} for values in (results, *plain)))
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))
    assert [launch.kernel for launch in launches] == ["mixture_em_fwd_kernel", "mixture_em_bwd_kernel"] * 2


def test_mixture_em_of_a_constant_nothing_and_nan(device, launches):
    scores = torch.full((128, 2, 3), 0.1, device=device)
    scores[5, 1, 1] = torch.nan
    with use_backend("triton"):
        loss, posterior = ops.mixture_em_loss(scores)
        empty = scores[:0].clone().requires_grad_()
        none = ops.mixture_em_loss(empty).loss
        none.sum().backward()
    torch.testing.assert_close(loss[0], torch.full_like(loss[0], 2).log())
    assert loss[1].isnan() and posterior[:, 1].isnan().all() and not posterior[:, 0].isnan().any()
    assert not none.any() and len(launches) == 1
    constants = {"mean": torch.zeros(3, device=device), "std": torch.ones(3, device=device)}
    prior = torch.tensor([0, 0.5, 0.5], device=device)
    with use_backend("triton"):
        loss, posterior = ops.mixture_em_loss(torch.tensor([[100.0, 0, 0]], device=device), 5.0, prior, **constants)
    torch.testing.assert_close(posterior[0], prior)
    torch.testing.assert_close(loss, torch.tensor(4.0, device=device).log())
