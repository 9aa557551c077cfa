import math

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from fastroute.models import create_model
from fastroute.nn import CrossConnection, CrossPrediction2d
from fastroute.training.optim import OPTIMIZERS, check_warmup, learning_rate, parameter_groups, scheduler


def rates(sched, epochs, per_epoch=1, lr=1.0, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    schedule = scheduler(optimizer, sched, epochs=epochs, steps=epochs * per_epoch, **options)
    found = []
    for _ in range(epochs * per_epoch):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_step_decays_at_fixed_intervals():
    assert rates("step", 7, 2, decay_epochs=3) == pytest.approx([1] * 6 + [0.1] * 6 + [0.01] * 2)


def test_milestones_are_at_two_fifths_and_three_quarters_unless_given():
    assert rates("multistep", 20, decay_rate=0.5) == pytest.approx([1] * 8 + [0.5] * 7 + [0.25] * 5)
    assert rates("multistep", 1, 20) == pytest.approx([1] * 8 + [0.1] * 7 + [0.01] * 5)  # within the only epoch
    assert rates("multistep", 4, 2, decay_milestones=(1, 3)) == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_ends_at_nearly_zero():
    assert rates("cosine", 4, 2) == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])


def test_warmup_does_not_shift_the_schedule():
    found = rates("multistep", 8, 2, warmup_epochs=2, decay_milestones=(4,))
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1] + [0.1] * 8)
    found = rates("onecycle", 10, 10, warmup_epochs=2)
    assert found.index(max(found)) == 19
    with pytest.raises(ValueError, match="warmup_epochs is 3; with 'onecycle' it must be below epochs, 3"):
        rates("onecycle", 3, warmup_epochs=3)


def test_a_warm_up_longer_than_the_run_is_refused():
    check_warmup("cosine", 3, 3)
    with pytest.raises(ValueError, match="warmup_epochs is 4; it must be at most epochs, 3"):
        check_warmup("cosine", 4, 3)


def test_groups_are_of_gates_norms_and_all_others():
    model = create_model("resnet20_cc2")
    groups = {
        group["name"]: group
        for group in parameter_groups(
            model, lr=0.1, weight_decay=1e-4, norm_weight_decay=0.0, gate_lr_mult=2.0, gate_wd=1e-2
        )
    }
    assert {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()} == {
        "others": (0.1, 1e-4),
        "norms": (0.1, 0.0),
        "gates": (0.2, 1e-2),
    }
    assert len(groups["gates"]["params"]) == 4 * 4 and any(p is model.stem_router.b2 for p in groups["gates"]["params"])
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(groups["norms"]["params"]) == 2 * len(norms)
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))


def test_of_a_cross_prediction_the_gates_alone_are_gates():
    model = create_model("resnet20_cp2")
    groups = {group["name"]: group["params"] for group in parameter_groups(model, lr=1.0, weight_decay=0.0)}
    routers = [module for module in model.modules() if isinstance(module, CrossPrediction2d)]
    assert {id(p) for p in groups["gates"]} == {id(p) for r in routers for p in (r.w1, r.b1, r.w2, r.b2)}


def test_by_default_all_decay_alike_and_frozen_or_shared_parameters_come_once_or_never():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    model[2].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    groups = parameter_groups(model, lr=0.1, weight_decay=0.5)
    assert [len(group["params"]) for group in groups] == [2, 2]
    assert all((group["lr"], group["weight_decay"]) == (0.1, 0.5) for group in groups)


def test_optimisers():
    groups = {
        name: make([{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1}], 0.8).param_groups[0]
        for name, make in OPTIMIZERS.items()
    }
    assert {name: group.get("nesterov") for name, group in groups.items() if "sgd" in name or "nest" in name} == {
        "sgd": False,
        "nesterov": True,
    }
    assert {name for name, group in groups.items() if group.get("momentum") == 0.8} == {"sgd", "nesterov", "rmsprop"}


def test_parametrised_and_pruned_gates_are_gates():
    model = create_model("resnet20_cc2")
    weight_norm(model.stem_router, "w2")
    prune.random_unstructured(model.stack1_router, "w1", 0.5)
    groups = {group["name"]: group["params"] for group in parameter_groups(model, lr=1.0, weight_decay=0.0)}
    assert len(groups["gates"]) == 4 * 4 + 1  # a length and a direction in place of w2
    assert any(p is model.stack1_router.w1_orig for p in groups["gates"])
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_biases_and_norms_do_not_decay_on_request():
    model = create_model("base_cnn_cc2")
    groups = parameter_groups(model, lr=0.1, weight_decay=0.5, gate_lr_mult=2.0, filter_bias_and_bn=True)
    assert {g["name"]: (g["lr"], g["weight_decay"]) for g in groups} == {
        "others": (0.1, 0.5),
        "biases": (0.1, 0.0),
        "norms": (0.1, 0.0),
        "gates": (0.2, 0.5),
        "gate_biases": (0.2, 0.0),
    }
    assert all(p.dim() > 1 for p in groups[0]["params"]) and all(p.dim() == 1 for p in groups[1]["params"])
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_a_cycle_may_rise_in_one_step():
    for steps in range(3, 60):  # some reciprocals times their number are 1, and some are not
        for epochs in {steps, steps / 2 if steps % 2 == 0 else steps}:
            found = rates("onecycle", int(epochs), int(steps / epochs), warmup_epochs=epochs / steps)
            assert found[0] == pytest.approx(1 / 25) and found[1] == max(found) > 0.4 and found[-1] < 0.01


def test_what_a_network_exempts_does_not_decay_on_request():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions, self.dense = nn.Parameter(torch.ones(1, 4, 2)), nn.Linear(2, 2)

        def no_weight_decay(self):
            return {"positions", "not there"}

    model = nn.Sequential(Positions())
    for wish, decay in ((True, 0.0), (False, 0.5)):
        groups = parameter_groups(model, lr=0.1, weight_decay=0.5, filter_bias_and_bn=wish)
        (found,) = (g["weight_decay"] for g in groups if any(p is model[0].positions for p in g["params"]))
        assert found == decay


def test_layers_before_the_last_learn_slower():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Sequential(nn.Conv2d(2, 2, 1)), nn.Linear(2, 2)
    )
    groups = parameter_groups(model, lr=1.0, weight_decay=0.0, layer_decay=0.5)
    assert {g["name"]: g["lr"] for g in groups} == {"others.0": 0.25, "others.1": 0.5, "others.2": 1.0, "norms.0": 0.25}
    model = create_model("resnet20_cc2")
    groups = parameter_groups(model, lr=1.0, weight_decay=0.0, layer_decay=0.5)
    assert {g["lr"] for g in groups if g["name"].startswith("gates")} == {2.0**-k for k in (7, 5, 3, 1)}
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_rates_start_at_warmup_lr_and_end_at_min_lr():
    found = rates("cosine", 10, warmup_epochs=4, min_lr=0.1, warmup_lr=0.2)
    assert found[:4] == pytest.approx([0.4, 0.6, 0.8, 0.1 + 0.9 * (1 + math.cos(0.3 * math.pi)) / 2])
    assert min(found[4:]) == found[-1] == pytest.approx(0.1 + 0.9 * (1 + math.cos(0.9 * math.pi)) / 2)
    assert min(rates("step", 9, decay_epochs=1, min_lr=0.01)) == 0.01
    assert rates("onecycle", 10, 10, min_lr=0.02)[-1] == pytest.approx(0.02)


def test_limits_of_rates_are_not_those_of_gates():
    network = create_model("resnet20_cc2")
    for mult in (0.1, 10.0):
        groups = parameter_groups(network, lr=0.1, weight_decay=0.0, gate_lr_mult=mult)
        optimizer = torch.optim.SGD(groups)
        schedule = scheduler(optimizer, "cosine", epochs=4, steps=40, warmup_epochs=2, min_lr=0.01, warmup_lr=0.05)
        found = []
        for _ in range(40):
            found.append(learning_rate(optimizer))
            optimizer.step()
            schedule.step()
        assert min(found) >= 0.01 and found[0] == pytest.approx(0.05 + 0.05 / 20)
        assert learning_rate(optimizer) == pytest.approx(0.01)
        (gates,) = {g["lr"] for g in optimizer.param_groups if g["name"] == "gates"}
        assert gates == pytest.approx(0.01 * mult)


def test_the_learning_rate_shown_is_not_that_of_gates():
    network = create_model("resnet20_cc2")
    options = {"lr": 0.02, "weight_decay": 0.0, "gate_lr_mult": 5.0}
    optimizer = OPTIMIZERS["sgd"](parameter_groups(network, **options), 0.9)
    assert max(group["lr"] for group in optimizer.param_groups) == 0.1 and learning_rate(optimizer) == 0.02
    assert learning_rate(torch.optim.SGD(network.parameters(), lr=0.3)) == 0.3


def test_norms_decay_as_they_are_told_where_biases_do_not():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    options = {"weight_decay": 1e-4, "norm_weight_decay": 1e-2, "filter_bias_and_bn": True}
    groups = parameter_groups(model, lr=0.1, **options)
    assert {g["name"]: g["weight_decay"] for g in groups} == {"others": 1e-4, "biases": 0.0, "norms": 1e-2}


def test_gates_under_the_older_weight_norm_are_gates():
    router = CrossConnection(4, 2, 2)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(router, "w2", dim=None)
    groups = parameter_groups(router, lr=0.1, weight_decay=0.0, gate_lr_mult=2.0)
    assert {g["name"]: g["lr"] for g in groups} == {"gates": 0.2}
