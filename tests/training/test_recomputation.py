"""Gradient checkpointing."""

import copy
import types

import pytest
import timm
import torch
from torch import nn

from fastroute.models import create_model
from fastroute.training import RoutingClassifier
from fastroute.training.recomputation import checkpoint_gradients


def step(model, x):
    """Return loss, gates and the bytes that the forward pass kept for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        logits, routing = model(x, return_routing=True)
    loss = logits.square().mean() + sum(r.scores.square().mean() for r in routing.values())
    loss.backward()
    return loss.detach(), routing, sum(kept)


@pytest.mark.parametrize(
    "name, options",
    [("resnet20_cc2", {}), ("resnet20", {}), ("resnet20_sparse4_top2", {"routing": "cluster", "capacity_factor": 1.0})],
)
def test_gradients_and_statistics_are_the_same_and_less_is_kept(name, options):
    torch.manual_seed(0)
    plain = create_model(name, **options)
    other = copy.deepcopy(plain)
    checkpoint_gradients(other)
    other = copy.deepcopy(other)  # as a moving average is made
    x = torch.randn(8, 3, 16, 16)
    (loss, routing, kept), (other_loss, other_routing, other_kept) = step(plain, x), step(other, x)
    assert torch.equal(loss, other_loss) and other_kept < kept / 2
    assert all(torch.equal(routing[r].gates, other_routing[r].gates) for r in routing)
    for (key, a), b in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key  # a path without samples has none
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=key)
    for (key, a), b in zip(plain.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), key
    assert list(plain.state_dict()) == list(other.state_dict())
    assert torch.equal(plain.eval()(x), other.eval()(x))


def test_uses_the_checkpointing_of_timm_s_networks():
    model = timm.create_model("resnet10t")
    checkpoint_gradients(model)
    assert model.grad_checkpointing


def test_refuses_networks_without_blocks_and_compilation():
    with pytest.raises(ValueError, match="Sequential has no blocks of layers"):
        checkpoint_gradients(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="compile is True, and grad_checkpointing too"):
        RoutingClassifier("resnet20", grad_checkpointing=True, compile=True)


def test_blocks_keep_a_forward_of_their_own():
    network, x = create_model("torchvision:resnet18", 3).eval(), torch.randn(2, 3, 32, 32)
    block = network.layer2[0]
    block.forward = types.MethodType(lambda self, x: type(self).forward(self, x).tanh(), block)
    expected = network(x)
    for _ in range(2):  # the second time changes nothing
        checkpoint_gradients(network)
        torch.testing.assert_close(network(x), expected)
    torch.testing.assert_close(copy.deepcopy(network).train()(x).shape, expected.shape)
