"""Test BlockDrop and SkipNet: which blocks are computed, and how the gates learn."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F

from fastroute.models import create_model, executed_blocks
from fastroute.models.blockdrop import BlockDrop
from fastroute.models.cifar_resnet import cifar_resnet
from fastroute.models.convnet_aig import ConvNetAIG
from fastroute.models.skipnet import SkipNet


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randn(4, 3, 8, 8)


TARGETS = F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()


def gates_of(routing):
    return torch.stack([gates[:, 0, 1] for gates, _ in routing.values()], 1)


def drawn(monkeypatch, *patterns):
    """Make torch.bernoulli return patterns, in turn."""
    found = iter(patterns)
    monkeypatch.setattr(torch, "bernoulli", lambda p: next(found).to(p.dtype).expand_as(p).clone())


def test_have_the_parameters_of_resnet110_and_of_their_gates():
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in create_model(name).parameters())
            for name in ("resnet110", "blockdrop110", "skipnet110")
        }
    assert counts == {"resnet110": 1_730_714, "blockdrop110": 1_730_714 + 80_902, "skipnet110": 1_730_714 + 21_111}


def test_a_network_of_all_blocks_is_the_resnet_of_the_same_weights(images):
    resnet = cifar_resnet(8, num_classes=3).eval()
    for model in (BlockDrop(8, num_classes=3).eval(), SkipNet(8, num_classes=3).eval()):
        assert model.load_state_dict(resnet.state_dict(), strict=False).unexpected_keys == []
        logits, routing = model(images, return_routing=True)
        assert executed_blocks(routing).tolist() == [3.0] * 4  # as they start
        torch.testing.assert_close(logits, resnet(images))


@pytest.mark.parametrize("build", [BlockDrop, SkipNet, ConvNetAIG])
def test_skipped_blocks_are_counted(build, images):
    model = build(8).eval()
    gate = {BlockDrop: lambda: model.policy.head[2], SkipNet: lambda: model.choose, ConvNetAIG: None}[build]
    if gate is None:
        torch.nn.init.constant_(model.stack2[0].gate[-1].bias, 0)
        model.stack2[0].gate[-1].bias.data[0] = 9
        counts = [2.0] * 4
    else:
        torch.nn.init.constant_(gate().bias, -1)
        counts = [0.0] * 4
    _, routing = model(images, return_routing=True)
    assert executed_blocks(routing).tolist() == counts
    for gates, scores in routing.values():
        assert gates.shape == scores.shape == (4, 1, 2)
        assert torch.equal(gates.argmax(-1), scores.argmax(-1))


def test_blockdrop_computes_the_given_blocks(images):
    model, gates = BlockDrop(8).eval(), torch.tensor([[0.0, 1, 0]]).expand(4, 3)
    x = model.stem(images)
    for name, block, gate in zip(("stack1", "stack2", "stack3"), "abc", (0, 1, 0), strict=True):
        block = model.get_submodule(name)[0]
        x = (block.shortcut(x) + gate * block.residual(x)).relu()
    torch.testing.assert_close(model(images, gates=gates), model.head(x))
    assert model(images, return_routing=True, gates=gates)[1] == {}


def learned(model):
    """Return which of the policy and the blocks have gradients."""
    with_gradients = {name.startswith("policy") for name, p in model.named_parameters() if p.grad is not None}
    return {True: "policy", False: "blocks"}[with_gradients.pop()] if len(with_gradients) == 1 else "both"


def test_blockdrop_trains_the_blocks_then_the_policy_then_both(images):
    model, seen = BlockDrop(8, pretrain=0.4, curriculum=0.3, num_classes=3), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["gates"], model.training)), with_kwargs=True
    )
    for progress, trained, first in (
        (0.0, "blocks", 3),
        (0.41, "policy", 2),
        (0.55, "policy", 1),
        (0.69, "policy", 0),
        (0.7, "both", 0),
    ):
        seen.clear()
        before = {name: value.clone() for name, value in model.named_buffers() if not name.startswith("policy")}
        model.zero_grad()
        loss, logits = model.training_loss(images, TARGETS, progress)
        loss.backward()
        assert learned(model) == trained and logits.shape == (4, 3) and model.training
        assert all((gates[:, :first] == 1).all() for gates, _ in seen)
        frozen = trained == "policy"
        assert [training for _, training in seen] == [not frozen] * (1 if trained == "blocks" else 2)
        after = dict(model.named_buffers())
        assert all(torch.equal(before[name], after[name]) for name in before) == frozen


def test_blockdrop_s_gradient_is_that_of_the_expected_reward(images, monkeypatch):
    """The mean over all policies, by their probabilities, of the gradient of the loss."""
    model = BlockDrop(8, pretrain=0, curriculum=1, entropy=0, penalty=2, num_classes=3)
    torch.nn.init.normal_(model.policy.head[2].weight)
    model.eval()  # so that batch norm does not depend on the batch
    image, policies = images[:1], [torch.tensor(policy) for policy in product((0.0, 1.0), repeat=3)]
    logits = torch.cat([model(image, gates=policy[None]) for policy in policies]).detach()
    model.head[2].bias.data -= logits.mean(0)  # so that what is skipped decides on the class
    classes = (logits - logits.mean(0)).argmax(1)
    target = F.one_hot(classes[:1], 3).float()
    assert 0 < (classes == classes[0]).sum() < 8
    p = 0.2 + 0.6 * model.policy(image).sigmoid()[0]
    expected, total = 0.0, 0.0
    for policy, right in zip(policies, classes == classes[0], strict=True):
        chance = torch.where(policy > 0, p, 1 - p).prod()
        expected = expected - chance * (1 - policy.mean() ** 2 if right else -2.0)
        drawn(monkeypatch, policy)
        total = total + chance.detach() * model.training_loss(image, target, 1 - 1e-6)[0]
    weight = model.policy.head[2].weight
    (wanted,), (given,) = (torch.autograd.grad(loss, weight, retain_graph=True) for loss in (expected, total))
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-7)
    assert wanted.abs().max() > 1e-3


def test_blockdrop_explores_and_adds_the_cross_entropy_at_last(images, monkeypatch):
    torch.manual_seed(0)
    ones = torch.ones(4, 3)
    losses = {}
    for entropy, progress in ((0.0, 0.3), (0.5, 0.3), (0.5, 0.7)):
        torch.manual_seed(1)
        model = BlockDrop(8, pretrain=0, curriculum=0.4, entropy=entropy, num_classes=3).eval()
        drawn(monkeypatch, ones)
        losses[entropy, progress] = model.training_loss(images, TARGETS, progress)[0].item()
        p = 0.2 + 0.6 * model.policy(images).sigmoid()
        cross_entropy = F.cross_entropy(model(images, gates=ones), TARGETS).item()
    assert losses[0.0, 0.3] == 0  # what was drawn is what is likelier
    assert losses[0.5, 0.3] == pytest.approx(
        0.5 * (p * p.log() + (1 - p) * (1 - p).log()).sum(1).mean().item(), rel=1e-4
    )
    assert losses[0.5, 0.7] == pytest.approx(cross_entropy, rel=1e-5)


def test_skipnet_s_gates_learn_from_cross_entropy(images):
    model = SkipNet(8, num_classes=3)
    loss, logits = model.training_loss(images, TARGETS, 0.5)
    torch.testing.assert_close(loss, F.cross_entropy(logits, TARGETS))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.choose.bias.grad.abs() > 0 and model.recur.weight_ih.grad.abs().max() > 0
    _, routing = model(images, return_routing=True)
    assert set(gates_of(routing).detach().unique().tolist()) <= {0.0, 1.0}


def test_skipnet_s_hybrid_loss(images, monkeypatch):
    """Cross-entropy, and for each gate what follows it as its reward."""
    torch.manual_seed(0)
    model = SkipNet(8, alpha=0.6, num_classes=3).eval()
    gates = torch.tensor([[1.0, 0, 1], [0, 0, 1], [1, 1, 1], [1, 0, 0]])
    drawn(monkeypatch, *gates.unbind(1), *gates.unbind(1))
    loss, logits = model.training_loss(images, TARGETS, 0.9)
    _, routing = model(images, return_routing=True, draw=True)
    assert torch.equal(gates_of(routing), gates)
    losses = F.cross_entropy(logits, TARGETS, reduction="none")
    returns = torch.tensor(
        [[0.6 / 3 * (1 - gates[n, i:]).sum() - losses.detach()[n] for i in range(3)] for n in range(4)]
    )
    chances = torch.stack([scores[:, 0, 1].sigmoid() for _, scores in routing.values()], 1)
    chances = torch.where(gates > 0, chances, 1 - chances).log()
    expected = losses.mean() - ((returns - returns.mean(0)) * chances).sum() / 4
    torch.testing.assert_close(loss, expected)
    for one, other in zip(
        *(torch.autograd.grad(x, model.parameters(), retain_graph=True) for x in (loss, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_in_bfloat16(images):
    for model in (BlockDrop(8, num_classes=3), SkipNet(8, num_classes=3)):
        with torch.autocast("cpu", torch.bfloat16):
            for progress in (0.0, 0.6, 1.0):
                loss, _ = model.training_loss(images, TARGETS, progress)
                loss.backward()
                assert loss.isfinite()


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (BlockDrop, {"pretrain": 1.5}, "pretrain is 1.5; it must be from 0 to 1, a share of the run"),
        (BlockDrop, {"pretrain": 0.7, "curriculum": 0.4}, "pretrain is 0.7, and curriculum 0.4; together"),
        (BlockDrop, {"penalty": -1}, "penalty is -1; it must be at least 0"),
        (BlockDrop, {"bound": 1}, "bound is 1; it must be above 0.5 and below 1"),
        (SkipNet, {"reinforce": -0.1}, "reinforce is -0.1; it must be from 0 to 1"),
        (SkipNet, {"alpha": -1}, "alpha is -1; it must be at least 0"),
        (SkipNet, {"gate_channels": 0}, "gate_channels is 0; it must be at least 1"),
    ],
)
def test_wrong_arguments(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(8, **arguments)
