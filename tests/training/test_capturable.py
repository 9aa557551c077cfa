import pytest
import torch
from torch import nn

from fastroute.training.capturable import CAPTURABLE
from fastroute.training.optim import OPTIMIZERS, scheduler
from tests.training.recorder import Recorder

STEPS = 12


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def optimised(make, sched="onecycle", state=None, start=0):
    """An optimiser with two groups, and its schedule."""
    model = network()
    groups = [
        {"params": model[0].parameters(), "lr": 0.02, "weight_decay": 0.1},
        {"params": model[2].parameters(), "lr": 0.01, "weight_decay": 0.0},
    ]
    optimizer = make(groups, 0.9)
    schedule = scheduler(optimizer, sched, epochs=4, steps=STEPS, decay_milestones=(1, 2))
    return model, optimizer, schedule


def batch(i):
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(i), dtype=torch.float64)


def gradients(model, optimizer, x):
    optimizer.zero_grad()
    model(x).square().sum().backward()


def train(model, optimizer, schedule, steps=range(STEPS)):
    for i in steps:
        gradients(model, optimizer, batch(i))
        optimizer.step()
        schedule.step()


def assert_same(model, other, **tolerance):
    for expected, actual in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, **tolerance)


@pytest.mark.parametrize("sched", ["multistep", "onecycle"])
@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_steps_match_pytorch(opt, sched):
    expected, actual = optimised(OPTIMIZERS[opt], sched), optimised(CAPTURABLE[opt], sched)
    train(*expected), train(*actual)
    assert_same(expected[0], actual[0], rtol=1e-5, atol=1e-6)  # its rates are float32
    assert not torch.allclose(expected[0][0].weight, network()[0].weight, atol=1e-2)


@pytest.mark.parametrize("opt", OPTIMIZERS)
def test_a_recorded_update_follows_the_schedule(opt):
    expected, (model, optimizer, schedule) = optimised(CAPTURABLE[opt]), optimised(CAPTURABLE[opt])
    train(*expected)
    train(model, optimizer, schedule, range(2))
    x, graph = batch(2).clone(), Recorder()

    def step():
        gradients(model, optimizer, x)
        optimizer.update()
        return ()

    for i in range(2, STEPS):
        x.copy_(batch(i))
        optimizer.refresh()
        if not graph.calls:
            graph.record(step)
        graph.replay()
        schedule.step()
    assert_same(expected[0], model, rtol=0, atol=0)


@pytest.mark.parametrize("opt", OPTIMIZERS)
@pytest.mark.parametrize("to", [OPTIMIZERS, CAPTURABLE])
def test_state_is_interchangeable_with_pytorch(opt, to):
    expected = optimised(OPTIMIZERS[opt])
    train(*expected)
    model, optimizer, schedule = optimised((OPTIMIZERS if to is CAPTURABLE else CAPTURABLE)[opt])
    train(model, optimizer, schedule, range(5))
    state = optimizer.state_dict()
    resumed, optimizer, _ = optimised(to[opt])
    resumed.load_state_dict(model.state_dict())
    optimizer.load_state_dict(state)
    schedule.optimizer = optimizer
    train(resumed, optimizer, schedule, range(5, STEPS))
    assert_same(expected[0], resumed, rtol=1e-5, atol=1e-6)


def test_leaves_a_parameter_without_a_gradient():
    weights = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = CAPTURABLE["adamw"]([{"params": weights, "lr": 0.1, "weight_decay": 0.5}], 0.9)
    weights[0].grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(weights[1], torch.ones(2)) and not torch.equal(weights[0], torch.ones(2))
