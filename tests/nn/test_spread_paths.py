"""Paths of a sparse router spread over two processes, against one process with the joint batch."""

import copy
import gc
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from fastroute.nn import SparseRouter, leave_spread_paths, set_gate_norm
from tests.threads import small_networks  # noqa: F401

LIMIT = timedelta(seconds=60)
CASES = {
    "top-1": {},
    "clustered": {"top_k": 2, "routing": "cluster"},
    "channels_last": {"top_k": 2},
    "all to the paths of one process": {},
    "all to the paths of one process, channels_last": {},
}


def network(case, group=None):
    torch.manual_seed(0)
    paths = [nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)) for _ in range(4)]
    router = SparseRouter(6, paths, process_group=group, **CASES[case])
    model, x = nn.Sequential(nn.Conv2d(3, 6, 1), router), images(case)
    nn.init.normal_(router.w2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if case.startswith("all"):
            router.b2[:2] = 100
        else:
            std, mean = torch.std_mean(router.eval()._route(model[0](x)).scores, 0)
            router.w2 /= std.unsqueeze(1)
            router.b2.copy_((router.b2 - mean) / std)
    return model.train()


def images(case):
    x = torch.randn(20, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    x = x + 2 * torch.randn(20, 3, 1, 1, generator=torch.Generator().manual_seed(3))
    return x.to(memory_format=torch.channels_last) if case.endswith("channels_last") else x


def results_of(model, x, wrapped, samples):
    """Return results of a training step whose loss is the sum over samples divided by their number, and of the next."""
    y = wrapped(x)
    (y.square().sum() / samples).backward()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return y.detach(), gradients, state, model.eval()(x).detach()


def _one_of_two(rank, place, results):
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        model, part = network(case, dist.group.WORLD), slice(0, 12) if case == "top-1" else slice(0, 10)
        x = images(case)[part] if rank == 0 else images(case)[part.stop :]
        parallel = nn.parallel.DistributedDataParallel(leave_spread_paths(model))
        found[case] = *results_of(model, x, parallel, len(images(case)) / 2), repr(model[1].spread)
        other = network(case, dist.group.WORLD)
        other.load_state_dict(network(case).state_dict())  # of all paths
    average = nn.Sequential(nn.Conv2d(3, 6, 1), copy.deepcopy(other[1]))  # as of an average of weights
    assert average[1].spread is other[1].spread and average[1].w2 is not other[1].w2
    with pytest.raises(ValueError, match="process_group has 2 processes for 3 paths; their number must divide"):
        SparseRouter(6, [nn.Identity()] * 3, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="process_group is given with paths=4; give the modules of the paths"):
        SparseRouter(6, 4, process_group=dist.group.WORLD)
    _paths_in_one_process(rank, found)
    results[rank] = found
    dist.destroy_process_group()


def _paths_in_one_process(rank, found):
    """Check a router of a group without the other process, which does not wait for it."""
    groups = [dist.new_group([r]) for r in range(2)]
    if rank == 0:
        model = network("clustered", groups[0])
        set_gate_norm(model, None)  # which keeps the group
        found["alone"] = model(images("clustered")).detach(), model[1].gate_norm.prior
    message = "network has paths spread over 1 of 2 processes"
    with pytest.raises(ValueError, match=message):
        leave_spread_paths(network("clustered", groups[rank]))
    leave_spread_paths(network("clustered", groups[rank]), groups[rank])


def _sharded_paths(rank, place, units):
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2, timeout=LIMIT)
    _check_sharded_paths(rank, units)
    gc.collect()  # FSDP's references to the group, which would end it while the interpreter ends
    dist.barrier()
    dist.destroy_process_group()


def _check_sharded_paths(rank, units):
    """Check paths whose weights are gathered from both processes, each of which has samples for another path."""
    torch.manual_seed(0)
    router = SparseRouter(4, [nn.Conv2d(4, 4, 1) for _ in range(4)], gate_channels=None)
    with torch.no_grad():
        router.w2.copy_(5 * torch.eye(4))
    whole, x = copy.deepcopy(router), torch.zeros(4, 4, 3, 3)
    x[:2, 0] = x[2:, 1] = 1
    network = nn.Sequential(router)
    for unit in {"paths": [*router.paths, router], "router": [router], "network": [network]}[units]:
        fully_shard(unit)
    own = x[2 * rank :][:2]
    y, wanted = network(own), whole(x)
    torch.testing.assert_close(y, wanted[2 * rank :][:2])
    y.square().mean().backward()
    wanted.square().mean().backward()
    for (name, sharded), one in zip(router.named_parameters(), whole.parameters(), strict=True):
        found = torch.zeros_like(one) if sharded.grad is None else sharded.grad.full_tensor()
        torch.testing.assert_close(found, torch.zeros_like(one) if one.grad is None else one.grad, msg=name)


@pytest.mark.parametrize("units", ["paths", "router", "network"])
def test_sharded_paths_run_in_every_process(tmp_path, units):
    torch.multiprocessing.spawn(_sharded_paths, (tmp_path / "store", units), nprocs=2)


def test_two_processes_match_one(tmp_path):
    results = torch.multiprocessing.Manager().dict()
    torch.multiprocessing.spawn(_one_of_two, (tmp_path / "store", results), nprocs=2)
    alone = network("clustered")
    torch.testing.assert_close(results[0]["alone"], (alone(images("clustered")).detach(), alone[1].gate_norm.prior))
    for case in CASES:
        whole, x = network(case), images(case)
        load = whole.eval()[1].divide(whole[0](x))[1].load
        assert (load[2:].sum() == 0) if case.startswith("all") else (load > 0).all()
        if case.startswith("all"):  # the second process passes an empty batch through its first path
            whole[1].paths[2][1].num_batches_tracked += 1
        y, gradients, state, evaluation = results_of(whole.train(), x, whole, len(x))
        ranks = [results[rank][case] for rank in range(2)]
        close = {"rtol": 1e-3, "atol": 1e-5}
        torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]), y, **close)
        torch.testing.assert_close(torch.cat([rank[3] for rank in ranks]), evaluation, **close)
        assert all(
            rank[0].is_contiguous(memory_format=torch.channels_last) == case.endswith("channels_last") for rank in ranks
        )
        for found, wanted in ((1, gradients), (2, state)):
            torch.testing.assert_close(ranks[0][found] | ranks[1][found], wanted, **close)
            shared = ranks[0][found].keys() & ranks[1][found].keys()
            assert not any("paths" in name for name in shared)
            for name in shared:
                torch.testing.assert_close(ranks[0][found][name], ranks[1][found][name], **close)
        assert [rank[4] for rank in ranks] == [f"paths {2 * r} to {2 * r + 1} in process {r} of 2" for r in (0, 1)]
