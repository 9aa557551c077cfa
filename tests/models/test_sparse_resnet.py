import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastroute import models
from fastroute.diagnostics import router_statistics
from fastroute.models.sparse_resnet import sparse_resnet
from fastroute.nn import GateClusteringLoss, SparseRouter

NAMES = {"resnet20_sparse4_top1": 1, "resnet20_sparse4_top2": 2}
ROUTERS = ["stack1", "stack2", "stack3"]


def batch(size=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 10


@pytest.mark.parametrize("name, top_k", NAMES.items())
def test_parameters_are_those_of_four_stacks_and_computation_that_of_one_path_or_two(name, top_k):
    with torch.device("meta"):
        sparse, plain, routed = (models.create_model(n) for n in (name, "resnet20", "resnet20_cc2"))
        macs = [models.count_macs(network, (3, 32, 32)) for network in (sparse, plain, routed)]

    def count(modules):
        return sum(p.numel() for module in modules for p in module.parameters())

    stacks = count([plain.stack1, plain.stack2, plain.stack3])
    gates = sum(16 * channels + 16 + 4 * 16 + 4 for channels in (16, 16, 32))
    assert count([sparse]) == count([plain]) + 3 * stacks + gates == 1_087_830
    assert macs[0] == pytest.approx(macs[top_k], rel=0.002)
    assert [sparse.get_submodule(router).top_k for router in ROUTERS] == [top_k] * 3


@pytest.mark.parametrize("routing", ["topk", "cluster"])
@pytest.mark.parametrize("name, top_k", NAMES.items())
def test_trains_and_reports_its_load(name, top_k, routing):
    torch.manual_seed(0)
    model, (x, labels) = models.create_model(name, routing=routing), batch()
    criterion, before = GateClusteringLoss(), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(3):
        logits, found = model(x, return_routing=True)
        losses.append(F.cross_entropy(logits, labels) + 0.01 * criterion(found))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] and list(found) == ROUTERS
    assert all(not torch.equal(model.state_dict()[f"{router}.w2"], before[f"{router}.w2"]) for router in ROUTERS)
    statistics = router_statistics(model, [(x, labels), (x[:5], labels[:5])])
    loads = [model.eval()(part, return_routing=True)[1] for part in (x, x[:5])]
    for router in ROUTERS:
        load = sum(part[router].load for part in loads)
        assert load.sum() == 21 * top_k
        torch.testing.assert_close(statistics[router].shares_of_samples, load[None] / 21, check_dtype=False)


def test_options_reach_the_routers():
    model = models.create_model("resnet20_sparse4_top1", routing="cluster", gates="softmax", capacity_factor=1.25)
    assert all(
        (r.routing, r.gates, r.capacity_factor, r.gate_norm.kind) == ("cluster", "softmax", 1.25, "standardize")
        for r in model.modules()
        if isinstance(r, SparseRouter)
    )
    assert models.Specification.from_dict(model.specification.to_dict()).build().stack1.routing == "cluster"
    with pytest.raises(ValueError, match="routing is 'cc'; it must be one of 'topk', 'cluster'"):
        models.create_model("resnet20_sparse4_top1", routing="cc")
    with pytest.raises(ValueError, match=r"depth is 21; it must be 6k \+ 2"):
        sparse_resnet(21, 4, 1)


def test_resumes_as_if_it_had_not_stopped():
    x, labels = batch()

    def fresh():
        model = sparse_resnet(8, 4, 2, "cluster")
        return nn.ModuleDict({"model": model, "loss": GateClusteringLoss()})

    def step(run):
        logits, routing = run["model"](x, return_routing=True)
        run.zero_grad()
        (F.cross_entropy(logits, labels) + 0.1 * run["loss"](routing)).backward()
        with torch.no_grad():
            for parameter in run.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad

    torch.manual_seed(0)
    run, other = fresh(), fresh()
    step(run)
    other.load_state_dict(copy.deepcopy(run.state_dict()))
    for each in (run, other):
        step(each)
    for name, value in run["model"].state_dict().items():
        assert torch.equal(value, other["model"].state_dict()[name]), name


def test_compiles_with_breaks_and_trains_in_bfloat16():
    torch.manual_seed(0)
    model, (x, labels) = sparse_resnet(8, 4, 2, "cluster").to(memory_format=torch.channels_last), batch()
    x = x.to(memory_format=torch.channels_last)
    expected = copy.deepcopy(model)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(copy.deepcopy(model), backend="aot_eager")(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        F.cross_entropy(model(x), labels).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
