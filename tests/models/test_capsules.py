"""Capsules: squashing, routing by agreement, the margin loss and the decoder."""

import pytest
import torch
from torch.nn import functional as F

from fastroute.models import create_model
from fastroute.models.capsules import CapsNet, ClassCapsules, Decoder, scores_of, squash, unit_range
from fastroute.models.weights import load_pretrained


def small(num_classes=4, **options):
    return CapsNet(6, 2, 3, **{"num_classes": num_classes, "in_chans": 1, "img_size": 7} | options)


def shares(labels, num_classes=4):
    return F.one_hot(torch.tensor(labels), num_classes).float()


def test_has_the_paper_s_parameters():
    with torch.device("meta"):
        model = create_model("capsnet", 10, in_chans=1, img_size=28)
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert sum(parts.values()) == 8_215_568
    assert parts["classes"] == 32 * 6 * 6 * 10 * 8 * 16 and parts["decoder"] == 161 * 512 + 513 * 1024 + 1025 * 784


def test_squash_keeps_directions_and_bounds_lengths():
    s = torch.tensor([[3.0, 4.0], [0.03, 0.04], [0.0, 0.0]], requires_grad=True)
    torch.testing.assert_close(
        squash(s).norm(dim=1), torch.tensor([25 / 26, 0.0025 / 1.0025, 0.0]), rtol=1e-3, atol=1e-6
    )
    torch.testing.assert_close(F.normalize(squash(s[0])[None]), torch.tensor([[0.6, 0.8]]))
    squash(s).sum().backward()
    assert s.grad.isfinite().all()


def test_routing_is_procedure_1_of_the_paper():
    torch.manual_seed(0)
    layer = ClassCapsules(5 * 8, 3).double()
    u = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = torch.empty(2, 3, 16, dtype=torch.float64)
    for n in range(2):
        votes = [[layer.weight[k, i].detach() @ u[n, i] for k in range(3)] for i in range(5)]
        b = torch.zeros(5, 3, dtype=torch.float64)
        for _ in range(3):
            c = b.softmax(1)
            s = [sum(c[i, k] * votes[i][k] for i in range(5)) for k in range(3)]
            v = [squash(each) for each in s]
            b = b + torch.tensor([[votes[i][k] @ v[k] for k in range(3)] for i in range(5)], dtype=torch.float64)
        expected[n] = torch.stack(s)
    torch.testing.assert_close(layer(u.flatten(1)), expected)


def test_scores_are_the_log_odds_of_the_lengths():
    model, x = small().eval(), torch.randn(3, 1, 7, 7)
    with torch.no_grad():
        scores, capsules = model(x), model(x, return_capsules=True)
    lengths = squash(capsules).norm(dim=-1)
    torch.testing.assert_close(scores.sigmoid(), lengths, rtol=1e-3, atol=1e-6)
    odds = lengths / (1 - lengths)
    torch.testing.assert_close(scores.softmax(1), odds / odds.sum(1, keepdim=True), rtol=1e-3, atol=1e-6)


def test_the_loss_is_margin_and_reconstruction():
    torch.manual_seed(0)
    model, x, labels = small(reconstruction=0.01), torch.randn(3, 1, 7, 7), [2, 0, 3]
    loss, scores = model.training_loss(x, shares(labels), 0.0)
    capsules = squash(model(x, return_capsules=True))
    margin = 0.0
    for n, lengths in enumerate(capsules.norm(dim=-1)):
        for k, length in enumerate(lengths):
            margin = margin + (F.relu(0.9 - length) ** 2 if k == labels[n] else 0.5 * F.relu(length - 0.1) ** 2)
    masked = capsules * shares(labels)[:, :, None]
    first = F.linear(masked.flatten(1), model.decoder.weight.flatten(0, 1).T, model.decoder.bias)
    errors = (model.decoder.layers(first) - unit_range(x)).square().sum()
    torch.testing.assert_close(loss, (margin + 0.01 * errors) / 3, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores, model(x))
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())


def test_images_are_reconstructed_between_0_and_1():
    model, x = small().eval(), torch.randn(3, 1, 7, 7)
    labels = scores_of(model(x, return_capsules=True)).argmax(1)
    assert model.reconstruct(x).shape == x.shape and model.reconstruct(x).aminmax().max <= 1
    torch.testing.assert_close(model.reconstruct(x), model.reconstruct(x, labels))
    other = model.reconstruct(x, (labels + 1) % 4)
    assert not torch.allclose(other, model.reconstruct(x), rtol=0, atol=1e-7)
    scaled = unit_range(torch.stack([x[0], torch.full_like(x[0], 3.0)]))
    assert scaled[0].min() == 0 and scaled[0].max() == 1 and (scaled[1] == 0).all()


def test_learns():
    torch.manual_seed(0)
    x, labels = torch.randn(8, 1, 7, 7), [0, 1, 2, 3] * 2
    model = small()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss, _ = model.training_loss(x, shares(labels), 0.0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0] and model(x).argmax(1).tolist() == labels


def test_starts_from_weights_for_other_classes():
    given, model, said = small(10), create_model("capsnet", 4, 1, 7, channels=6, capsules=2, kernel_size=3), []
    load_pretrained(model, given.state_dict(), "pretrained_path is w.pt", say=said.append)
    assert torch.equal(model.primary.weight, given.primary.weight)
    assert "classes.weight, decoder.weight for 4 classes start fresh" in said[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 8}, "img_size is 8; it must be at least 17 for two convolutions of 9×9 without padding"),
        ({"iterations": 0}, "iterations is 0; it must be at least 1"),
        ({"kernel_size": 0}, "kernel_size is 0; it must be at least 1"),
        ({"reconstruction": -1}, "reconstruction is -1; it must be at least 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model("capsnet", **arguments)


def test_images_of_another_size_or_channels_are_refused():
    for shape in ((1, 9, 9), (3, 7, 7)):
        with pytest.raises(
            ValueError, match=f"images are of {' × '.join(map(str, shape))}; this network is built for 1 × 7"
        ):
            small()(torch.randn(2, *shape))
    assert small(in_chans=3, img_size=8)(torch.randn(2, 3, 8, 8)).shape == (2, 4)


def test_a_decoder_of_no_classes_is_empty():
    assert Decoder(0, (1, 7, 7)).weight.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gradients_of_empty_capsules_are_finite(dtype):
    capsules = torch.zeros(2, 3, 16, dtype=dtype, requires_grad=True)
    (squash(capsules).sum() + scores_of(capsules).sum()).backward()
    assert squash(capsules).dtype == scores_of(capsules).dtype == dtype
    assert scores_of(capsules).isfinite().all() and capsules.grad.isfinite().all()
