import torch

from fastroute.training.metrics import Totals


def test_errors_are_exact_over_uneven_batches():
    totals = Totals()
    logits = torch.eye(10)[:3]
    totals.update(torch.tensor(1.0), logits, torch.tensor([0, 1, 2]))
    totals.update(torch.tensor(5.0), logits[:1], torch.tensor([9]))
    result = totals.compute()
    assert (result["loss"], result["error"], result["error5"]) == (2, 25, 25)


def test_top_5_counts_a_label_among_the_first_five():
    totals = Totals()
    scores = torch.arange(10.0).expand(2, 10)
    totals.update(torch.tensor(0.0), scores, torch.tensor([5, 4]))
    assert totals.compute()["error"] == 100 and totals.compute()["error5"] == 50


def test_of_a_mixture_the_larger_share_counts():
    totals = Totals()
    totals.update(torch.tensor(0.0), torch.eye(2), torch.tensor([[0.7, 0.3], [0.9, 0.1]]))
    assert totals.compute()["error"] == 50


def test_sums_stay_in_their_tensors_and_a_replayed_update_counts_as_one():
    totals = Totals()
    sums = [getattr(totals, name) for name in Totals.SUMS]
    totals.update(torch.tensor(3.0), torch.eye(10)[:2], torch.tensor([0, 9]))
    assert totals.compute()["error"] == 50
    totals.reset()
    assert all(getattr(totals, name) is total and total == 0 for name, total in zip(Totals.SUMS, sums, strict=True))
    sums[0] += 6
    sums[1] += 2
    totals.update()
    assert totals.compute()["loss"] == 3
