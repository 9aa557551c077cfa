"""Statistics of gates over many samples."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastroute.diagnostics.statistics import RouterStatistics, needed_paths
from fastroute.nn import Routing
from fastroute.nn.sparse import SparseRouting

# Of 240 samples and 4 outgoing paths: gates (N, 4), and what they use, tell apart and need.
CASES = {
    "one-hot, 3 of 4 paths": (F.one_hot(torch.arange(240) % 3, 4).double(), 3, 3, 3),
    "even": (torch.full((240, 4), 0.25), 4, 1, 1),
    "all to one path": (torch.tensor([1.0, 0, 0, 0]).expand(240, 4), 1, 1, 1),
    "even but for rounding": (torch.full((240, 4), 0.25) + 1e-8 * torch.randn(240, 4), 4, 1, 1),
    "half of the samples lean a little": (
        torch.tensor([[0.26, 0.24, 0.25, 0.25], [0.24, 0.26, 0.25, 0.25]]).repeat(120, 1), 4, 1, 2
    ),
    "unevenly, one-hot": (
        F.one_hot((torch.arange(240) % 4 == 0).long(), 4).double(), *[math.exp(0.5623351446)] * 2, 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_used_paths_clusters_and_needed_paths(case):
    gates, used, clusters, needed = CASES[case]
    gates = torch.stack([gates, F.one_hot(torch.arange(240) % 4, 4).to(gates)], 1)  # a second path, as clear as can be
    parts = [RouterStatistics.of(Routing(part, part)).cpu() for part in gates.split(100)]
    statistics = parts[0] + parts[1] + parts[2]
    torch.testing.assert_close(statistics.used_paths, torch.tensor([used, 4.0]).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(statistics.effective_clusters, torch.tensor([clusters, 4.0]).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(needed_paths(gates), torch.tensor([needed, 4.0]).double(), rtol=1e-3, atol=0)


def test_gates_of_sparse_routers_that_do_not_sum_to_1_count_by_their_shares():
    chosen = F.one_hot(torch.arange(240) % 4, 4)
    gates = chosen * torch.linspace(0.3, 0.9, 240)[:, None]  # as of gates="softmax"
    gates[:8] = 0  # dropped by a capacity
    parts = [RouterStatistics.of(SparseRouting(part, part, None, None)).cpu() for part in gates.split(100)]
    found = parts[0] + parts[1] + parts[2]
    assert found.used_paths.item() == pytest.approx(4) and found.effective_clusters.item() == pytest.approx(4)
    assert found.mean_entropy.item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(found.mean_gates, gates.mean(0, keepdim=True).double(), rtol=1e-5, atol=0)


def test_a_router_that_drops_all_samples_uses_one_path():
    gates = torch.zeros(4, 3)
    found = RouterStatistics.of(SparseRouting(gates, gates, None, None)).cpu()
    assert found.used_paths.tolist() == found.effective_clusters.tolist() == [1]


def test_no_samples_leave_the_statistics_of_others_as_they_are():
    gates = torch.rand(6, 2, 3).softmax(-1)
    some, none = (RouterStatistics.of(Routing(part, part)) for part in (gates, gates[:0]))
    for total in (some + none, none + some):
        assert total.samples == 6 and torch.equal(total.peak, some.peak) and torch.equal(total.trough, some.trough)
        assert torch.equal(total.gates, some.gates) and torch.equal(total.wins, some.wins)


def test_many_gates_that_do_not_differ_need_one_path():
    gates = torch.tensor([0.1, 0.9, 0.0]).expand(50_000, 1, 3).contiguous()  # whose mean is not exact in float32
    assert needed_paths(gates).tolist() == [1]


def test_a_single_outgoing_path_counts_as_one():
    gates = torch.ones(5, 2, 1)
    statistics = RouterStatistics.of(Routing(gates, gates)).cpu()
    ones = torch.ones(2, dtype=torch.float64)
    assert torch.equal(statistics.used_paths, ones) and torch.equal(statistics.effective_clusters, ones)
    assert torch.equal(needed_paths(gates), ones) and torch.equal(needed_paths(gates[:1]), ones)


@pytest.mark.parametrize("paths", [2, 3, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_even_gates_are_neither_above_nor_below_their_share(paths, dtype):
    gates = torch.zeros(4, 1, paths, dtype=dtype).softmax(-1)
    for statistics in (RouterStatistics.of(Routing(gates, gates)), RouterStatistics.of(Routing(gates, gates)).cpu()):
        assert statistics.never_above.all() and statistics.never_below.all()
    gates[0, 0, 0] += 1e-5
    assert not RouterStatistics.of(Routing(gates, gates)).cpu().never_above[0, 0]


def test_dropped_samples_do_not_sharpen_the_others_gates():
    gates = torch.full((16, 4), 0.25)
    gates[:8] = 0  # dropped by a capacity
    found = RouterStatistics.of(SparseRouting(gates, gates, None, None)).cpu()
    assert found.used_paths.item() == pytest.approx(4) and found.effective_clusters.item() == pytest.approx(1)
    assert found.wins.tolist() == [[8, 0, 0, 0]]
